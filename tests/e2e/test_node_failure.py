"""A node is lost: the gang goes on elsewhere, soon, and what is left of it on the lost node is obeyed by nobody."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1 import health_pb2

from tests.cluster.faults import Faults
from tests.cluster.kubectl import Object
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.cluster.waiting import wait_until
from tests.e2e.support import pod_processes
from tests.e2e.support.clients import Client
from tests.e2e.support.gang_calls import CONTROL, inner_ports, intrude, token_of
from tests.e2e.support.models import DeployedModel, condition, node_of
from tests.e2e.support.restarts import STURDY, Before, ask
from tests.e2e.support.timings import Stopwatch, Timings
from tpmodel_operator import names

READY = "tpmodel.v1.Ready"
LOST_SECONDS = 60.0
"""For a node to count as not Ready: its grace period of 16 s, and a controller that looks every 5 s."""
TOLERATION: int = STURDY["scheduling"]["deadNodeToleration"]
RESTART_SECONDS = TOLERATION + 10
"""From NotReady to the restart: what the issue promises."""
THAWED_SECONDS = 15.0
"""For an old leader that runs again to find out and to end."""


@pytest.fixture
def bystander(sturdy: DeployedModel, cluster: LocalCluster, target: Target) -> Iterator[Client]:
    """A client on a node that has no pod of the model, and so will not be broken."""
    taken = {node_of(pod) for pod in sturdy.pods()}
    node = next(node.name for node in cluster.nodes if node.name not in taken)
    client = Client.start(sturdy.kubectl, target.worker_image, name="bystander", node=node)
    yield client
    client.stop()


def test_an_old_leader_on_a_node_without_kubelet_is_fenced(
    sturdy: DeployedModel, bystander: Client, faults: Faults, cluster: LocalCluster, timings: Timings
) -> None:
    before = Before.of(sturdy)
    answer = ask(sturdy, bystander)
    node, old_leader = node_of(before.leader), before.leader["status"]["podIP"]
    inside = pod_processes.of_container(before.leader, names.CONTAINER)
    supervisor = pod_processes.first_of(before.leader, names.CONTAINER)

    with watched(sturdy) as watch:
        faults.stop_kubelet_and_containerd(node)
        wait_not_ready(cluster, node)
        clock = Stopwatch()
        # Its containers live: whoever knows the address is served. Then they are held up, and miss what follows.
        assert is_serving(old_leader)
        with pod_processes.frozen(inside):
            gang = before.wait_restarted()
            timings.note("kubelet and containerd stopped", "Ready elsewhere, from NotReady", clock.seconds)
            check_decided_soon(gang, cluster, node, timings, fault="kubelet and containerd stopped")
            after = Before.of(sturdy)
            assert node not in {node_of(pod) for pod in after.pods}
        # The old leader wakes up, and does not know what has happened.
        wait_until(lambda: not pod_processes.alive(supervisor), what="end of the old leader", seconds=THAWED_SECONDS)

    assert watch.most_ready == 1
    check_disobeyed(after, bystander, attempt=before.attempt)
    assert ask(sturdy, bystander) == answer
    after.check_untouched()


def test_a_gang_restarts_soon_after_its_leaders_node_lost_power(
    sturdy: DeployedModel, bystander: Client, faults: Faults, cluster: LocalCluster, timings: Timings
) -> None:
    before = Before.of(sturdy)
    answer = ask(sturdy, bystander)
    node = node_of(before.leader)

    clock = Stopwatch()
    faults.power_off(node)
    gang = before.wait_restarted()

    timings.note("node powered off", "Ready elsewhere", clock.seconds)
    check_decided_soon(gang, cluster, node, timings, fault="node powered off")
    assert ask(sturdy, bystander) == answer
    faults.bring_back(node)
    before.check_restarted_once()


# --------------------------------------------------------------------------------------------------------- helpers


@dataclass
class Watch:
    """Counts a model's Ready leader pods all the time."""

    most_ready: int = 0
    _stopped: threading.Event = field(default_factory=threading.Event)

    def look(self, model: DeployedModel) -> None:
        """Until stopped."""
        while not self._stopped.is_set():
            self.most_ready = max(self.most_ready, len(model.leaders()), len(ready_addresses(model)))
            time.sleep(0.3)

    def stop(self) -> None:
        """Ends it."""
        self._stopped.set()


@contextmanager
def watched(model: DeployedModel) -> Iterator[Watch]:
    """Counts for as long as the block lasts."""
    watch = Watch()
    thread = threading.Thread(target=watch.look, args=(model,))
    thread.start()
    try:
        yield watch
    finally:
        watch.stop()
        thread.join()


def check_decided_soon(gang: Object, cluster: LocalCluster, node: str, timings: Timings, *, fault: str) -> None:
    """The restart was decided for the lost node, and in time."""
    assert gang["lastRestart"]["cause"] == "NodeLost"
    decided = datetime.datetime.fromisoformat(gang["lastRestart"]["time"])
    waited = (decided - not_ready_since(cluster, node)).total_seconds()
    timings.note(fault, "restart decided, from NotReady", waited)
    assert waited <= RESTART_SECONDS


def ready_addresses(model: DeployedModel) -> set[str]:
    """Where clients are sent."""
    service = f"kubernetes.io/service-name={names.leaders_service(model.name)}"
    return {
        address
        for endpoints in model.kubectl.list("endpointslices", selector=service)
        for endpoint in endpoints["endpoints"] or []
        if endpoint["conditions"].get("ready")
        for address in endpoint["addresses"]
    }


def check_disobeyed(gang: Before, client: Client, *, attempt: int) -> None:
    """Supervisor, rank and engine refuse whoever is of a lower attempt, though it knows all secrets."""
    token = token_of(gang.model, gang.gang["name"])
    calls = intrude(client, gang.worker, inner_ports(gang.worker), token, attempt=attempt)
    calls |= intrude(client, gang.leader, CONTROL, token, attempt=attempt)
    for name in ("Kill", "GetSupervisorStatus", "Session", "Register", "Drain"):
        assert calls[name].startswith("FAILED_PRECONDITION"), calls


def is_serving(address: str) -> bool:
    """What a probe of readiness finds."""
    with grpc.insecure_channel(f"{address}:{names.HEALTH_PORT}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service=READY), timeout=10)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


def wait_not_ready(cluster: LocalCluster, node: str) -> None:
    """Returns when the cluster has noticed."""
    wait_until(lambda: node in cluster.not_ready(), what=f"{node} not Ready", seconds=LOST_SECONDS, interval=0.3)


def not_ready_since(cluster: LocalCluster, node: str) -> datetime.datetime:
    """When the cluster has noticed."""
    ready = condition(cluster.kubectl.get("node", node)["status"], "Ready")
    assert ready["status"] != "True"
    return datetime.datetime.fromisoformat(ready["lastTransitionTime"])
