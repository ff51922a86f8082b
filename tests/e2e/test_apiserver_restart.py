"""The API server goes away for a while: what happens meanwhile is not lost, and nothing else is done about it."""

from __future__ import annotations

import re
import time
import urllib.request

from tests.cluster.faults import Faults
from tests.cluster.kubectl import Object
from tests.cluster.waiting import wait_until
from tests.e2e.support import pod_processes
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
FRESH_SECONDS = 60.0
"""For another operator to lead and to have its first pass over every model."""
REPORTED = ("epoch", "phase", "readyRanks", "loadPercent")
"""What a gang's leader says every 10 s."""


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
    assert gang["lastRestart"]["cause"] == "ContainerEnded"
    sturdy.wait_ready()
    after = Before.of(sturdy)
    known = state(sturdy)
    replace_operator(installed)
    assert state(sturdy) == known
    after.check_untouched()


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
    gangs = [{name: value for name, value in gang.items() if name not in REPORTED} for gang in status["gangs"]]
    return {"status": status | {"gangs": gangs}, "children": children}


def content(item: Object) -> Object:
    """Which object it is, and all that somebody wrote into it."""
    return {"uid": item["metadata"]["uid"]} | {part: item[part] for part in ("data", "spec") if part in item}


def replace_operator(release: Release) -> None:
    """Another process leads, and has looked at every model."""
    leader = wait_until(release.leader, what="a leading operator", seconds=FRESH_SECONDS)
    release.kubectl.delete("pod", leader["metadata"]["name"], wait=False)

    def has_looked() -> bool:
        now = release.leader()
        if now is None or now["metadata"]["uid"] == leader["metadata"]["uid"]:
            return False
        metrics = read_metrics(now)
        return 0 < metrics.get("models", 0) <= metrics.get('reconcile_seconds_count{result="ok"}', 0)

    wait_until(has_looked, what="a pass of a fresh operator over every model", seconds=FRESH_SECONDS)


def read_metrics(operator: Object) -> dict[str, float]:
    """An operator's own metrics, by name without prefix."""
    address = operator["status"]["podIP"]
    with urllib.request.urlopen(f"http://{address}:8081/metrics", timeout=5) as answer:
        text = answer.read().decode()
    found = re.findall(r"^tpmodel_operator_(\S+) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}
