"""Containers that end again and again, and those that say that no retry helps."""

from __future__ import annotations

import datetime

from tests.cluster.kubectl import Kubectl, Object
from tests.e2e.support.clients import Client
from tests.e2e.support.manifests import CLAIM
from tests.e2e.support.models import DeployedModel, deployed
from tests.e2e.support.timings import Stopwatch, Timings

BACKOFF = 4
"""Seconds before the second restart; the third comes after twice as long."""
RESTARTS = 3
CRASHING = [{"name": "PYTHONHOME", "value": "/nowhere"}]
"""Python ends at once, with 1, in whatever it was to run."""
FAILED_SECONDS = 90.0
"""4 containers that start and end, 4 s each on a busy machine, pods of 5 s grace between them, and 12 s of backoff."""


def test_a_crash_loop_backs_off_fails_with_its_cause_and_is_healed_by_an_edit(
    models: Kubectl, client: Client, timings: Timings
) -> None:
    recovery = {"maxRestarts": RESTARTS, "backoffBase": BACKOFF, "backoffLimit": 60}
    with deployed(models, "crashing", ready=False, env=CRASHING, recovery=recovery) as model:
        clock = Stopwatch()
        waits = backoffs_until_failed(model)
        timings.note("crash loop, 3 restarts", "Failed", clock.seconds)

        assert waits == [0, BACKOFF, 2 * BACKOFF]
        check_failed(model)

        models.run("patch", "tpmodel/crashing", "--type=merge", '--patch={"spec":{"env":[]}}')
        model.wait_ready()
        timings.note("crash loop, 3 restarts", "Ready after an edit", clock.seconds)
        assert model.condition("Stalled")["status"] == "False"
        assert model.gang()["restartsTotal"] == 0
        assert len(client.complete(model.url, [[1, 2, 3]], max_tokens=4, ignore_eos=True)[0]) == 4


def backoffs_until_failed(model: DeployedModel) -> list[int]:
    """Waits until the gang is Failed; returns how many seconds each restart had to wait, by its attempt."""
    waits: dict[int, int] = {}

    def failed() -> bool:
        gangs = model.gangs()
        for restart in [gang["restart"] for gang in gangs if "restart" in gang]:
            waits[restart["attempt"]] = seconds_between(restart["started"], restart["notBefore"])
            if restart["began"]:
                assert restart["notBefore"] <= restart["began"], "it began before its backoff was over"
        return any("failure" in gang for gang in gangs)

    model.until(failed, what="Failed", seconds=FAILED_SECONDS, interval=0.2)
    return [waits[attempt] for attempt in sorted(waits)]


def check_failed(model: DeployedModel) -> None:
    """Status and Events say that the budget is spent, and why; the gang is left alone."""
    gang = model.gang()
    assert gang["phase"] == "Failed"
    assert gang["restarts"] == RESTARTS
    assert gang["attempt"] == RESTARTS + 1
    failure = gang["failure"]
    assert (failure["reason"], failure["cause"], failure["exitCode"]) == ("BudgetSpent", "ContainerEnded", 1)
    assert "its container ended with 1" in failure["message"]
    stalled = model.condition("Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "BudgetSpent")
    assert model.status()["state"] == "Failed"
    told = model.wait_events("GangFailed")
    assert len(model.events("GangRestart")) == RESTARTS
    assert [event["message"] for event in told] == [
        f"gang {gang['name']} is left alone (BudgetSpent): ContainerEnded: {failure['message']}"
    ]


def seconds_between(started: str, end: str) -> int:
    """Of two times of a status; no end: 0."""
    if not end:
        return 0
    return round((datetime.datetime.fromisoformat(end) - datetime.datetime.fromisoformat(started)).total_seconds())


def test_exit_64_fails_at_once_and_says_what_cannot_work(models: Kubectl) -> None:
    no_checkpoint: Object = {"model": {"uri": f"pvc://{CLAIM}/nothing-here"}}
    with deployed(models, "refusing", ready=False, **no_checkpoint) as model:
        model.until(lambda: model.condition("Stalled").get("status") == "True", what="Stalled", seconds=FAILED_SECONDS)
        gang = model.gang()
        failure = gang["failure"]
        assert (failure["reason"], failure["cause"], failure["exitCode"]) == (
            "ConfigurationRefused",
            "ConfigurationRefused",
            64,
        )
        assert "nothing-here" in failure["message"]
        assert (gang["attempt"], gang["restartsTotal"]) == (1, 0)
        assert model.condition("Stalled")["reason"] == "ConfigurationRefused"
        assert "nothing-here" in model.condition("Ready")["message"] + model.condition("Stalled")["message"]
