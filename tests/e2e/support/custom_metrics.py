"""Runs the custom-metrics API server in the cluster and registers it, so that autoscalers find it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.certificates import Authority
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.waiting import wait_until
from tests.e2e.support import custom_metrics_program as program
from tests.e2e.support import manifests

NAMESPACE = NAME = "custom-metrics"
API_SERVICE = f"{program.VERSION}.{program.GROUP}"
VALUE_FILE = "/tmp/value"
READY_SECONDS = 120.0
"""For a pod whose image is on the node; the API server looks at an APIService every 30 s at the latest."""
WRITE = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"


@dataclass(frozen=True)
class CustomMetrics:
    """The server that runs."""

    kubectl: Kubectl

    def set(self, value: int) -> None:
        """From now on every pod has this value, of every metric."""
        self.kubectl.execute(NAME, "python3", "-c", WRITE, VALUE_FILE, str(value))


@contextlib.contextmanager
def served(kubectl: Kubectl, image: str, *, value: int) -> Iterator[CustomMetrics]:
    """The API as long as the block lasts; `image` has Python."""
    within = kubectl.within(NAMESPACE)
    try:
        kubectl.apply(*_cluster_wide())
        within.apply(*_secret_and_program(), *_pod_and_service(image))
        within.wait("pod", NAME, "condition=Ready", seconds=READY_SECONDS)
        server = CustomMetrics(within)
        server.set(value)
        # Last: an API that is registered and does not answer disturbs the whole cluster.
        kubectl.apply(_api_service())
        kubectl.wait("apiservice", API_SERVICE, "condition=Available", seconds=READY_SECONDS)
        wait_until(lambda: _answers(kubectl), what="custom metrics", seconds=READY_SECONDS, interval=1.0)
        yield server
    finally:
        kubectl.delete("apiservice", API_SERVICE)
        kubectl.delete("clusterrolebinding", NAME)
        kubectl.delete("clusterrole", NAME)
        kubectl.delete("namespace", NAMESPACE)


def _answers(kubectl: Kubectl) -> bool:
    try:
        kubectl.run("get", "--raw", f"{program.BASE}/namespaces/{NAMESPACE}/pods/*/any?labelSelector=")
    except ClusterError:
        return False
    return True


def _cluster_wide() -> list[Object]:
    role: Object = {"kind": "ClusterRole", "name": NAME, "apiGroup": "rbac.authorization.k8s.io"}
    return [
        manifests.restricted_namespace(NAMESPACE),
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": NAME},
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}],
        },
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRoleBinding",
            "metadata": {"name": NAME},
            "roleRef": role,
            "subjects": [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}],
        },
    ]


def _api_service() -> Object:
    return {
        "apiVersion": "apiregistration.k8s.io/v1",
        "kind": "APIService",
        "metadata": {"name": API_SERVICE},
        "spec": {
            "group": program.GROUP,
            "version": program.VERSION,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "insecureSkipTLSVerify": True,
            "service": {"name": NAME, "namespace": NAMESPACE},
        },
    }


def _secret_and_program() -> list[Object]:
    source = Path(program.__file__)
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        authority.create()
        certificate = authority.issue("server", NAME)
        files = {"tls.crt": certificate.certificate.read_text(), "tls.key": certificate.key.read_text()}
    return [
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": NAME}, "stringData": files},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": NAME},
            "data": {source.name: source.read_text()},
        },
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": NAME}},
    ]


def _pod_and_service(image: str) -> list[Object]:
    source = Path(program.__file__).name
    container: Object = {
        "name": "server",
        "image": image,
        "command": ["python3", f"/program/{source}", "/keys/tls.crt", "/keys/tls.key", VALUE_FILE],
        "securityContext": manifests.RESTRICTED_CONTAINER,
        "readinessProbe": {"tcpSocket": {"port": program.PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "volumeMounts": [
            {"name": "program", "mountPath": "/program"},
            {"name": "keys", "mountPath": "/keys"},
            {"name": "temporary", "mountPath": "/tmp"},
        ],
    }
    spec: Object = {
        "serviceAccountName": NAME,
        "terminationGracePeriodSeconds": 0,
        "securityContext": manifests.RESTRICTED_POD | {"fsGroup": 1000},
        "containers": [container],
        "volumes": [
            {"name": "program", "configMap": {"name": NAME}},
            {"name": "keys", "secret": {"secretName": NAME, "defaultMode": 0o440}},
            {"name": "temporary", "emptyDir": {}},
        ],
    }
    labels = {"app": NAME}
    service = {"selector": labels, "ports": [{"port": 443, "targetPort": program.PORT}]}
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": NAME, "labels": labels}, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": service},
    ]
