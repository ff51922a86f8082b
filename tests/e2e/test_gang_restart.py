"""A pod or a process of a gang is lost: the gang restarts once, status says why, and it serves again."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cluster import pods
from tests.cluster.addresses import CLUSTER_DOMAIN
from tests.cluster.faults import Faults
from tests.e2e.support.clients import Client
from tests.e2e.support.gang_calls import status_of
from tests.e2e.support.models import DeployedModel, is_ready
from tests.e2e.support.restarts import Before, ask
from tests.e2e.support.timings import Stopwatch, Timings
from tpmodel_operator import names

NXDOMAIN_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One way to lose a part of a gang."""

    what: str
    inflict: Callable[[Before], None]
    cause: str
    said: str
    """Part of the message."""
    exit_code: int | None
    names_remembered: bool = False
    """Whether the name server still tells the old leader's address afterwards."""


def delete_worker_pod(before: Before) -> None:
    before.model.kubectl.delete("pod", before.worker["metadata"]["name"], wait=False)


def delete_leader_pod(before: Before) -> None:
    before.model.kubectl.delete("pod", before.leader["metadata"]["name"], wait=False)


def kill_rank(before: Before) -> None:
    kubectl, pod = before.model.kubectl, before.worker["metadata"]["name"]
    rank = next(process for process in pods.processes(kubectl, pod) if process.name == "tpmodel-rank1")
    pods.kill(kubectl, pod, rank)


LOSSES = (
    Loss(
        what="worker pod deleted",
        inflict=delete_worker_pod,
        cause="PodDeleted",
        said="was deleted",
        exit_code=None,
    ),
    Loss(
        what="leader pod deleted where names are remembered",
        inflict=delete_leader_pod,
        cause="PodDeleted",
        said="was deleted",
        exit_code=None,
        names_remembered=True,
    ),
    Loss(
        what="rank killed by SIGKILL",
        inflict=kill_rank,
        cause="RestartRequested",
        said="rank 1",
        exit_code=75,
    ),
)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.what.replace(" ", "_"))
def test_a_gang_restarts_once_and_says_why(
    sturdy: DeployedModel, client: Client, faults: Faults, timings: Timings, loss: Loss
) -> None:
    before = Before.of(sturdy)
    answer = ask(sturdy, client)
    if loss.names_remembered:
        faults.remember_names()
        client.look_up(names.leader_host(sturdy.name, before.gang["name"], str(sturdy.kubectl.namespace)))

    clock = Stopwatch()
    loss.inflict(before)
    gang = before.wait_restarted()

    timings.note(loss.what, "Ready", clock.seconds)
    assert gang["lastRestart"]["cause"] == loss.cause
    assert loss.said in gang["lastRestart"]["message"]
    assert gang["lastRestart"].get("exitCode") == loss.exit_code
    assert gang["lastRestart"]["attempt"] == gang["attempt"]
    sturdy.wait_events("GangRestart", saying=f"restarts at attempt {gang['attempt']}")
    assert ask(sturdy, client) == answer
    timings.note(loss.what, "a client has its answer", clock.seconds)
    before.check_restarted_once()


def test_a_worker_pod_comes_back_under_a_new_address_while_its_leader_has_no_name(
    sturdy: DeployedModel, faults: Faults, timings: Timings
) -> None:
    before = Before.of(sturdy)
    name, old_address = before.worker["metadata"]["name"], before.worker["status"]["podIP"]
    service = f"{names.pods_service(sturdy.name)}.{sturdy.kubectl.namespace}.svc.{CLUSTER_DOMAIN}"

    faults.deny_names([service])
    sturdy.kubectl.delete("pod", name, wait=False)
    sturdy.until(lambda: looks_for_its_leader(before, name), what="a new worker pod with a rank", interval=0.2)
    time.sleep(NXDOMAIN_SECONDS)
    assert not any(is_ready(pod) for pod in sturdy.pods())
    faults.deny_names([])
    clock = Stopwatch()

    before.wait_restarted()
    timings.note(f"NXDOMAIN for {NXDOMAIN_SECONDS:.0f} s", "Ready, from the first answer", clock.seconds)
    assert sturdy.kubectl.get("pod", name)["status"]["podIP"] != old_address
    assert all(not status["restartCount"] for pod in sturdy.pods() for status in pod["status"]["containerStatuses"])


def looks_for_its_leader(before: Before, name: str) -> bool:
    """Whether a pod of this name, and none of the former ones, has a rank to present."""
    pod = before.model.kubectl.find("pod", name)
    if pod is None or pod["metadata"]["uid"] in before.uids:
        return False
    if not any("running" in status["state"] for status in pod["status"].get("containerStatuses", [])):
        return False
    return any(process.port for process in status_of(pod).processes if process.name == "rank 1")
