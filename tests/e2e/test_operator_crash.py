"""The operator is killed between any two steps of a restart: its successor finishes the job, in one attempt."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cluster.kubectl import Object
from tests.cluster.local import LocalCluster
from tests.cluster.waiting import wait_until
from tests.e2e.support import pod_processes
from tests.e2e.support.models import DeployedModel, is_terminating
from tests.e2e.support.refusals import Write, refused
from tests.e2e.support.release import LEASE, NAMESPACE, Release
from tests.e2e.support.restarts import Before, attempt_in_config_map
from tpmodel_operator import names

STEP_SECONDS = 30.0
"""For the operator to come to a step: kubelet reports a container's end within a few seconds."""
FINISHED_SECONDS = 60.0
"""For a successor to lead (15 s until the Lease expires), and for pods to end (5 s) and to start again."""
PROBE = "probe"
IS_PROBE = f"(has(object.status.state) && object.status.state == '{PROBE}')"
ENDS_RESTART = (
    "(oldObject.status.gangs.exists(gang, has(gang.restart)) && !object.status.gangs.exists(gang, has(gang.restart)))"
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step of a restart that the API server refuses, so that the operator dies before it."""

    write: Write
    probe: Callable[[Before, str], list[str]]
    """A dry run of such a write, as arguments of kubectl."""
    reached: Callable[[Before], bool]
    """Whether everything before has happened, and nothing after."""


def status_write(before: Before, user: str) -> list[str]:
    patch = json.dumps({"status": {"state": PROBE}})
    return ["patch", "tpmodel", before.model.name, "--subresource=status", "--type=merge", f"--patch={patch}"]


def attempt_write(before: Before, user: str) -> list[str]:
    name = names.attempt_config_map(before.gang["name"])
    return ["patch", "configmap", name, "--type=merge", f'--patch={{"data":{{"{PROBE}":"1"}}}}']


def pod_delete(before: Before, user: str) -> list[str]:
    return ["delete", "pod", before.worker["metadata"]["name"]]


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


STATUS = {"group": "tpmodel.dev", "resource": "tpmodels/status", "operations": ("UPDATE",)}
STEPS = {
    "before_the_status": Step(write=Write(**STATUS), probe=status_write, reached=nothing_is_written),
    "before_the_attempt": Step(
        write=Write(group="", resource="configmaps", operations=("CREATE", "UPDATE")),
        probe=attempt_write,
        reached=status_is_written,
    ),
    "before_the_deletes": Step(
        write=Write(group="", resource="pods", operations=("DELETE",)), probe=pod_delete, reached=attempt_is_written
    ),
    "between_two_deletes": Step(
        write=Write(group="", resource="pods", operations=("DELETE",), which="oldObject.metadata.name.endsWith('-1')"),
        probe=pod_delete,
        reached=leader_pod_is_deleted,
    ),
    "before_the_end": Step(
        write=Write(**STATUS, which=f"{IS_PROBE} || {ENDS_RESTART}"), probe=status_write, reached=all_pods_are_deleted
    ),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_operators_restart_is_finished_in_one_attempt(
    sturdy: DeployedModel, installed: Release, cluster: LocalCluster, step: str
) -> None:
    sturdy.until(lambda: sturdy.gang()["formed"], what="formed", interval=0.2)
    before, held = Before.of(sturdy), STEPS[step]
    user = user_of(installed)
    probe = [*held.probe(before, user), "--dry-run=server", f"--as={user}"]

    with refused(sturdy.kubectl, held.write, user=user, probe=lambda kubectl: kubectl.run(*probe)):
        errors = failed_passes(installed)
        pod_processes.kill(pod_processes.first_of(before.worker, names.CONTAINER))
        sturdy.until(
            lambda: held.reached(before) and failed_passes(installed) > errors,
            what=f"a pass that failed {step}",
            seconds=STEP_SECONDS,
            interval=0.2,
        )
        kill_leader(installed, wait_for_lease=step == "before_the_status")

    sturdy.until(lambda: is_over(before), what="the end of the restart", seconds=FINISHED_SECONDS, interval=0.2)
    gang = before.check_restarted_once()
    assert gang["lastRestart"]["cause"] == "ContainerEnded"
    assert gang["lastRestart"]["exitCode"] == 128 + signal.SIGKILL


def test_after_all_these_crashes_the_gang_serves(sturdy: DeployedModel) -> None:
    before = Before.of(sturdy)
    sturdy.wait_ready()
    before.check_untouched()


def is_over(before: Before) -> bool:
    gang = before.model.gang()
    return gang["attempt"] > before.attempt and "restart" not in gang and gang["formed"] and len(gang["pods"]) == 2


def kill_leader(release: Release, *, wait_for_lease: bool) -> None:
    """SIGKILL of the operator that works.

    Its container starts again under the same name and may go on leading, or the other replica does: that one has to
    wait until the Lease expires, unless the Lease is gone.
    """
    leader = release.leader()
    assert leader is not None
    os.kill(pod_processes.first_of(leader, "operator"), signal.SIGKILL)
    if not wait_for_lease:
        release.kubectl.delete("lease", LEASE)


def user_of(release: Release) -> str:
    """As whom the operator speaks to the API server."""
    account = release.operators()[0]["spec"]["serviceAccountName"]
    return f"system:serviceaccount:{NAMESPACE}:{account}"


def failed_passes(release: Release) -> float:
    """Passes of the operator that works which ended with an error, by its metrics."""
    leader = wait_until(release.leader, what="a leading operator", seconds=FINISHED_SECONDS)
    with urllib.request.urlopen(f"http://{leader['status']['podIP']}:8081/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.search(r'^tpmodel_operator_reconcile_seconds_count\{result="error"\} (\S+)', text, re.MULTILINE)
    return float(found[1]) if found else 0.0
