"""Makes the API server refuse certain writes of the operator, so that a test can hold it between two steps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from tests.cluster.kubectl import Kubectl, KubectlError, Object
from tests.cluster.waiting import wait_until

POLICY = "hold-the-operator"
PROBE = "is-the-operator-held"
"""A ConfigMap that the policy refuses too, so that one can see when it is in force."""
IN_FORCE_SECONDS = 20.0
"""For the API server to take a new policy up: it looks every second or so."""


@dataclass(frozen=True, kw_only=True)
class Write:
    """A kind of write."""

    group: str
    resource: str
    operation: str
    subresource: str = ""
    which: str = "true"
    """CEL over `object` and `oldObject`: those that are meant."""

    @property
    def rule(self) -> Object:
        """What matches it."""
        path = f"{self.resource}/{self.subresource}" if self.subresource else self.resource
        return _rule(self.group, path, self.operation)

    @property
    def condition(self) -> str:
        """CEL: whether a request is such a write."""
        return (
            f"request.resource.resource == '{self.resource}' && request.subResource == '{self.subresource}'"
            f" && request.operation == '{self.operation}' && ({self.which})"
        )


@contextlib.contextmanager
def refused(kubectl: Kubectl, write: Write, *, user: str) -> Iterator[None]:
    """For as long as the block lasts, this user's write is refused in kubectl's namespace."""
    assert kubectl.namespace is not None
    try:
        kubectl.apply(_policy(write, user), _binding(kubectl.namespace))
        wait_until(lambda: _in_force(kubectl), what=f"a policy that refuses {write}", seconds=IN_FORCE_SECONDS)
        yield
    finally:
        kubectl.delete("validatingadmissionpolicybinding", POLICY)
        kubectl.delete("validatingadmissionpolicy", POLICY)
        wait_until(lambda: not _in_force(kubectl), what="no such policy any more", seconds=IN_FORCE_SECONDS)


def _in_force(kubectl: Kubectl) -> bool:
    try:
        kubectl.run("create", "configmap", PROBE, "--dry-run=server")
    except KubectlError as error:
        if POLICY not in error.output:
            raise
        return True
    return False


def _policy(write: Write, user: str) -> Object:
    condition = f"request.name == '{PROBE}' || (request.userInfo.username == '{user}' && {write.condition})"
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [write.rule, _rule("", "configmaps", "CREATE")]},
            "matchConditions": [{"name": "held", "expression": condition}],
            "validations": [{"expression": "false", "message": "held by a test"}],
        },
    }


def _rule(group: str, resource: str, operation: str) -> Object:
    return {"apiGroups": [group], "apiVersions": ["*"], "operations": [operation], "resources": [resource]}


def _binding(namespace: str) -> Object:
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": POLICY},
        "spec": {
            "policyName": POLICY,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}},
        },
    }
