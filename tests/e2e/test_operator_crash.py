"""The operator is killed between any two steps of a restart: its successor finishes the job, in one attempt."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cluster.kubectl import Object
from tests.cluster.local import LocalCluster
from tests.e2e.support import operators, pod_processes
from tests.e2e.support.models import DeployedModel, is_terminating
from tests.e2e.support.refusals import Write, refused
from tests.e2e.support.release import Release
from tests.e2e.support.restarts import Before, attempt_in_config_map
from tpmodel_operator import names
from tpmodel_operator.faults import EXIT_RESTART_GANG

STEP_SECONDS = 30.0
"""For the operator to come to a step: kubelet reports a container's end within a few seconds."""
FINISHED_SECONDS = 60.0
"""For a successor to lead (15 s until the Lease expires), and for pods to end (5 s) and to start again."""
ENDS_RESTART = (
    "(oldObject.status.gangs.exists(gang, has(gang.restart)) && !object.status.gangs.exists(gang, has(gang.restart)))"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a restart that the API server refuses, so that the operator dies before it."""

    write: Write
    reached: Callable[[Before], bool]
    """Whether everything before has happened, and nothing after."""


def nothing_is_written(before: Before) -> bool:
    ended = any(status["restartCount"] for pod in before.model.pods() for status in pod["status"]["containerStatuses"])
    return ended and before.model.gang()["attempt"] == before.attempt and not restart_of(before)


def status_is_written(before: Before) -> bool:
    written = restart_of(before).get("attempt") == before.attempt + 1
    return written and attempt_in_config_map(before.model, before.gang["name"]) == before.attempt


def attempt_is_written(before: Before) -> bool:
    raised = attempt_in_config_map(before.model, before.gang["name"]) == before.attempt + 1
    return raised and len(old_pods(before)) == 2 and not any(map(is_terminating, before.model.pods()))


def leader_pod_is_deleted(before: Before) -> bool:
    left = [pod for pod in old_pods(before) if not is_terminating(pod)]
    return bool(restart_of(before)) and [pod["metadata"]["name"] for pod in left] == [before.worker["metadata"]["name"]]


def all_pods_are_deleted(before: Before) -> bool:
    return bool(restart_of(before)) and not old_pods(before)


def restart_of(before: Before) -> Object:
    return before.model.gang().get("restart", {})


def old_pods(before: Before) -> list[Object]:
    return [pod for pod in before.model.pods() if pod["metadata"]["uid"] in before.uids]


def status_write(which: str = "true") -> Write:
    return Write(group="tpmodel.dev", resource="tpmodels", subresource="status", operation="UPDATE", which=which)


def pod_delete(which: str = "true") -> Write:
    return Write(group="", resource="pods", operation="DELETE", which=which)


STEPS = {
    "before_the_status": Step(write=status_write(), reached=nothing_is_written),
    "before_the_attempt": Step(
        write=Write(group="", resource="configmaps", operation="UPDATE"), reached=status_is_written
    ),
    "before_the_deletes": Step(write=pod_delete(), reached=attempt_is_written),
    "between_two_deletes": Step(
        write=pod_delete("oldObject.metadata.name.endsWith('-1')"), reached=leader_pod_is_deleted
    ),
    "before_the_end": Step(write=status_write(ENDS_RESTART), reached=all_pods_are_deleted),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_operators_restart_is_finished_in_one_attempt(
    sturdy_model: DeployedModel, installed: Release, cluster: LocalCluster, step: str
) -> None:
    # Not Ready: a gang whose containers all run is what a restart needs.
    sturdy_model.until(lambda: is_complete(sturdy_model), what="a complete gang", interval=0.2)
    before, held = Before.of(sturdy_model), STEPS[step]

    with refused(sturdy_model.kubectl, held.write, user=operators.user(installed)):
        failed = operators.metrics(installed).get(operators.FAILED, 0)
        pod_processes.kill(pod_processes.first_of(before.worker, names.CONTAINER))
        sturdy_model.until(
            lambda: held.reached(before) and operators.metrics(installed).get(operators.FAILED, 0) > failed,
            what=f"a pass that failed {step}",
            seconds=STEP_SECONDS,
            interval=0.2,
        )
        # Once the Lease is left to expire, as it is when a node dies; waiting so each time would prove nothing more.
        operators.kill_leader(installed, lease=step == "before_the_status")

    sturdy_model.until(lambda: is_over(before), what="the end of the restart", seconds=FINISHED_SECONDS, interval=0.2)
    gang = before.check_restarted_once()
    # Of the container that was killed, or of the other one, which has missed it by then.
    causes = {"ContainerEnded": 128 + signal.SIGKILL, "RestartRequested": EXIT_RESTART_GANG}
    assert gang["lastRestart"]["exitCode"] == causes[gang["lastRestart"]["cause"]]


def test_after_all_these_crashes_the_gang_serves(sturdy: DeployedModel) -> None:
    before = Before.of(sturdy)
    sturdy.wait_ready()
    before.check_untouched()


def is_over(before: Before) -> bool:
    return before.model.gang()["attempt"] > before.attempt and is_complete(before.model)


def is_complete(model: DeployedModel) -> bool:
    gang = model.gang()
    return "restart" not in gang and gang["formed"] and len(gang["pods"]) == 2
