"""A control plane with real controllers and scheduler, and nodes that kwok pretends: pods run at once, on nothing."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.kube_config import load_kube_config

from tests.cluster import binaries
from tests.cluster.apiserver import ApiServer
from tests.cluster.controllers import Controllers
from tests.cluster.processes import Daemon
from tpmodel.local import free_ports
from tpmodel_operator import crd
from tpmodel_operator.kube import MODELS, NODES, ApiError, Json, Kube, Resource
from tpmodel_operator.metrics import Metrics

PODS_PER_NODE = 200
QPS = 1000
"""Of controller-manager and scheduler: their defaults (20 and 50) would be what is measured."""
CONTROLLER_FLAGS = (
    f"--kube-api-qps={QPS}",
    f"--kube-api-burst={QPS}",
    "--concurrent-statefulset-syncs=20",
    # What this measures needs no other controllers, and the machine is small.
    "--controllers=statefulset-controller,garbage-collector-controller,namespace-controller,disruption-controller",
)
SCHEDULER_FLAGS = (f"--kube-api-qps={QPS}", f"--kube-api-burst={QPS}")
CRDS = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
NAMESPACES = Resource("v1", "Namespace", "namespaces")
API_SERVER_FLAGS = (
    # No controller runs that would make service accounts, or take the first taint from a node.
    "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition",
    "--endpoint-reconciler-type=none",
)
LIFE_OF_NODES_AND_PODS = """
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: node-comes-up}
spec:
  resourceRef: {apiGroup: v1, kind: Node}
  selector:
    matchExpressions: [{key: .status.phase, operator: DoesNotExist}]
  next:
    statusTemplate: |
      phase: Running
      conditions: [{type: Ready, status: "True", reason: Simulated, lastTransitionTime: {{ Now | Quote }}}]
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-runs}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.phase, operator: In, values: [Pending]}
  next:
    statusTemplate: |
      phase: Running
      podIP: {{ PodIP | Quote }}
      conditions: [{type: Ready, status: "True", lastTransitionTime: {{ Now | Quote }}}]
      containerStatuses:
      {{ range .spec.containers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        ready: true
        restartCount: 0
        state: {running: {startedAt: {{ Now | Quote }}}}
      {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ends}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions: [{key: .metadata.deletionTimestamp, operator: Exists}]
  next: {delete: true}
"""


@dataclass(frozen=True, slots=True)
class ScaleCluster:
    """A running control plane."""

    api: ApiServer
    folder: Path

    @property
    def kubeconfig(self) -> Path:
        """For a user who may do everything."""
        return self.api.kubeconfig

    async def client(self) -> Kube:
        """The operator's own client."""
        configuration = Configuration()
        await load_kube_config(str(self.kubeconfig), client_configuration=configuration)
        return Kube(configuration, Metrics())


@contextlib.contextmanager
def running() -> Iterator[ScaleCluster]:
    """Starts everything, and ends it."""
    programs = (binaries.ETCD, binaries.APISERVER, binaries.CONTROLLER_MANAGER, binaries.SCHEDULER, binaries.KWOK)
    binaries.ensure(programs)
    with tempfile.TemporaryDirectory(prefix="scale-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        port, etcd_port, etcd_peer_port = free_ports(3)
        api = ApiServer(
            folder=folder,
            port=port,
            etcd_port=etcd_port,
            etcd_peer_port=etcd_peer_port,
            flags=API_SERVER_FLAGS,
            dies_with_parent=True,
        )
        stack.callback(api.stop)
        api.start()
        controllers = Controllers(
            api=api,
            controller_manager_flags=CONTROLLER_FLAGS,
            scheduler_flags=SCHEDULER_FLAGS,
            dies_with_parent=True,
        )
        stack.callback(controllers.stop)
        controllers.start()
        kwok = Daemon(name="kwok", folder=folder)
        stack.callback(kwok.kill)
        stages = folder / "stages.yaml"
        stages.write_text(LIFE_OF_NODES_AND_PODS)
        kwok.start(
            [
                str(binaries.path(binaries.KWOK)),
                f"--kubeconfig={api.kubeconfig}",
                "--manage-all-nodes=true",
                f"--server-address=127.0.0.1:{free_ports(1)[0]}",
                f"--config={stages}",
                "--cidr=127.64.0.0/10",
            ],
            dies_with_parent=True,
        )
        yield ScaleCluster(api, folder)


async def prepare(kube: Kube, *, pods: int, namespaces: tuple[str, ...]) -> None:
    """The CRD, namespaces, and nodes for so many pods."""
    await kube.create(CRDS, "", crd.render())
    for namespace in namespaces:
        await kube.create(NAMESPACES, "", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
    for number in range(pods // PODS_PER_NODE + 1):
        await kube.create(NODES, "", _node(f"node-{number}"))
    while True:
        if await _ready_nodes(kube) > pods // PODS_PER_NODE and await _serves_models(kube, namespaces[0]):
            return
        await asyncio.sleep(0.5)


async def _serves_models(kube: Kube, namespace: str) -> bool:
    """Whether the API server knows TPModels by now: that comes a little after their definition."""
    try:
        async for _ in kube.list(MODELS, namespace):
            pass
    except ApiError as error:
        if error.not_found:
            return False
        raise
    return True


async def _ready_nodes(kube: Kube) -> int:
    ready = 0
    async for page in kube.list(NODES, None):
        ready += sum(_is_ready(node) for node in page.items)
    return ready


def _is_ready(node: Json) -> bool:
    conditions = node.get("status", {}).get("conditions", [])
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _node(name: str) -> Json:
    capacity = {"cpu": "1000", "memory": "1000Gi", "pods": str(PODS_PER_NODE)}
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "status": {"allocatable": capacity, "capacity": capacity},
    }
