"""The API server goes away for a while: what happens meanwhile is not lost, and nothing else is done about it."""

from __future__ import annotations

import time

from tests.cluster.faults import Faults
from tests.cluster.kubectl import Object
from tests.e2e.support import operators, pod_processes
from tests.e2e.support.models import DeployedModel
from tests.e2e.support.release import Release
from tests.e2e.support.restarts import Before
from tests.e2e.support.timings import Stopwatch, Timings
from tpmodel_operator import names

OUTAGE_SECONDS = 3.0
"""Long enough for kubelet to have seen the end, and to have had no answer."""
CHILDREN = (
    "statefulsets",
    "services",
    "configmaps",
    "networkpolicies",
    "poddisruptionbudgets",
    "serviceaccounts",
    "secrets",
)
REPORTED = ("epoch", "phase", "readyRanks", "loadPercent", "weightsVersion")
"""What a gang's leader says every 10 s; of the weights' version the model's status says the same."""


def test_what_happens_while_no_watch_works_is_found_afterwards_as_a_fresh_operator_finds_it(
    sturdy: DeployedModel, installed: Release, faults: Faults, timings: Timings
) -> None:
    before = Before.of(sturdy)
    worker = pod_processes.first_of(before.worker, names.CONTAINER)

    clock = Stopwatch()
    with faults.without_apiserver():
        pod_processes.kill(worker)
        time.sleep(OUTAGE_SECONDS)
    gang = before.wait_restarted()

    timings.note("API server restarted, a pod lost meanwhile", "Ready", clock.seconds)
    # Of the pod that was lost, or of the other one, which misses it: both have ended by now.
    assert gang["lastRestart"]["cause"] in ("ContainerEnded", "RestartRequested")
    sturdy.wait_ready()
    # A gang is ready when its leader is; kubelet looks at the other pods when their turn comes.
    sturdy.until(lambda: every_pod_is_ready(sturdy), what="every pod ready in its status")
    after = Before.of(sturdy)
    known = state(sturdy)
    operators.replace_leader(installed)
    assert state(sturdy) == known
    after.check_untouched()


def every_pod_is_ready(model: DeployedModel) -> bool:
    """Whether the operator has seen each pod ready."""
    return all(pod["ready"] for gang in model.gangs() for pod in gang["pods"])


def state(model: DeployedModel) -> Object:
    """What is decided about a model: its status, and what its children are made of."""
    selector = f"{names.MODEL_LABEL}={model.name}"
    children = {
        (item["kind"], item["metadata"]["name"]): (
            item["metadata"]["uid"],
            item["metadata"].get("generation"),
            content(item),
        )
        for kind in CHILDREN
        for item in model.kubectl.list(kind, selector=selector)
    }
    status = model.status()
    gangs = [without_reports(gang) for gang in status["gangs"]]
    return {"status": without_reports(status) | {"gangs": gangs}, "children": children}


def without_reports(part: Object) -> Object:
    """A part of the status, but for what leaders say."""
    return {name: value for name, value in part.items() if name not in REPORTED}


def content(item: Object) -> Object:
    """Which object it is, and all that somebody wrote into it."""
    return {"uid": item["metadata"]["uid"]} | {part: item[part] for part in ("data", "spec") if part in item}
