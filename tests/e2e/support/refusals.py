"""Makes the API server refuse certain writes of the operator, so that a test can hold it between two steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl, KubectlError, Object
from tests.cluster.waiting import wait_until

POLICY = "hold-the-operator"
ACTIVE_SECONDS = 20.0
"""For the API server to take a new policy up: it looks every second or so."""
EVERYTHING = "true"


@dataclass(frozen=True, kw_only=True)
class Write:
    """A kind of write."""

    group: str
    resource: str
    """Such as `pods` or `tpmodels/status`."""
    operations: tuple[str, ...]
    which: str = EVERYTHING
    """CEL over `object` and `oldObject`: those that are meant."""


@contextlib.contextmanager
def refused(kubectl: Kubectl, write: Write, *, user: str, probe: Callable[[Kubectl], object]) -> Iterator[None]:
    """For as long as the block lasts, this user's write is refused in kubectl's namespace.

    Args:
        kubectl: whose cluster and namespace are meant.
        write: what is refused.
        user: whose writes.
        probe: does such a write, or a dry run of it, through the kubectl that it is given; it acts as the user.
    """
    assert kubectl.namespace is not None
    try:
        kubectl.apply(_policy(write, user), _binding(kubectl.namespace))
        wait_until(lambda: _refuses(probe, kubectl), what=f"a policy that refuses {write}", seconds=ACTIVE_SECONDS)
        yield
    finally:
        kubectl.delete("validatingadmissionpolicybinding", POLICY)
        kubectl.delete("validatingadmissionpolicy", POLICY)
        wait_until(lambda: not _refuses(probe, kubectl), what="no policy any more", seconds=ACTIVE_SECONDS)


def _refuses(probe: Callable[[Kubectl], object], kubectl: Kubectl) -> bool:
    try:
        probe(kubectl)
    except KubectlError as error:
        if POLICY in error.output:
            return True
        raise ClusterError(f"the probe failed for another reason: {error.output}") from error
    return False


def _policy(write: Write, user: str) -> Object:
    rule = {
        "apiGroups": [write.group],
        "apiVersions": ["*"],
        "operations": list(write.operations),
        "resources": [write.resource],
    }
    return {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": POLICY},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [
                {"name": "user", "expression": f"request.userInfo.username == '{user}'"},
                {"name": "which", "expression": write.which},
            ],
            "validations": [{"expression": "false", "message": "held by a test"}],
        },
    }


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
