"""Events: what has changed between the status before a pass and the one after it.

So nothing is told twice, however often a pass runs, and nothing is told that status does not show.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from tpmodel_operator import chronicle, conditions, names, weights
from tpmodel_operator.actions import Event
from tpmodel_operator.api import Condition, GangStatus, TPModelSpec, TPModelStatus

_GOOD: dict[str, Literal["True", "False"]] = {
    conditions.ACCEPTED: "True",
    conditions.READY: "True",
    conditions.STALLED: "False",
}
"""Conditions that are told when they change, and the status that is good news."""


def between(before: TPModelStatus, after: TPModelStatus, spec: TPModelSpec) -> tuple[Event, ...]:
    """What a user wants to hear of this pass."""
    return (
        *_protection(before, after, spec),
        *_rollout(before, after),
        *_rebuild(before, after, spec),
        *_conditions(before, after),
        *_gangs(before, after),
    )


def _protection(before: TPModelStatus, after: TPModelStatus, spec: TPModelSpec) -> Iterator[Event]:
    if after.observed_generation != before.observed_generation and spec.replicas == 1:
        yield _warning(
            "NoDisruptionBudget",
            "a single gang has no PodDisruptionBudget, since that would block every drain: an eviction of one of its "
            "pods stops the model; write replicas: 2 or more to be protected",
        )


def _rollout(before: TPModelStatus, after: TPModelStatus) -> Iterator[Event]:
    if after.revision and before.revision and after.revision != before.revision:
        yield _normal("RolloutStarted", f"from revision {before.revision} to {after.revision}, image {after.image}")
    newer = _condition(after, conditions.UPGRADE_AVAILABLE)
    if newer is not None and newer.status == "True" and not _held(before, conditions.UPGRADE_AVAILABLE):
        yield _normal("UpgradeAvailable", newer.message)
    advice = _condition(after, conditions.ADVICE)
    if advice is not None and not _held(before, conditions.ADVICE):
        yield _warning(advice.reason, advice.message)


def _rebuild(before: TPModelStatus, after: TPModelStatus, spec: TPModelSpec) -> Iterator[Event]:
    if after.rebuild_requested == before.rebuild_requested or not before.observed_generation:
        return
    if spec.recovery.mode == "InPlace":
        yield _normal("RebuildRequested", f"all gangs are asked for a new world: {after.rebuild_requested}")
    else:
        yield _warning(
            "RebuildRefused",
            f"annotation {names.REBUILD_ANNOTATION}: gangs of recovery.mode {spec.recovery.mode} rebuild nothing in "
            "place: write mode: InPlace, or delete a pod to restart its gang",
        )


def _conditions(before: TPModelStatus, after: TPModelStatus) -> Iterator[Event]:
    for kind, good in _GOOD.items():
        earlier, now = _condition(before, kind), _condition(after, kind)
        if now is None or (earlier.status if earlier is not None else None) == now.status:
            continue
        if now.status == good:
            if earlier is not None or kind == conditions.READY:
                yield _normal(kind if good == "True" else f"No{kind}", now.message or f"no longer {kind.lower()}")
        elif earlier is not None or kind != conditions.READY:
            yield _warning(kind if good == "False" else f"Not{kind}", f"{now.reason}: {now.message}")


def _gangs(before: TPModelStatus, after: TPModelStatus) -> Iterator[Event]:
    earlier = {gang.name: gang for gang in before.gangs}
    for gang in after.gangs:
        was = earlier.pop(gang.name, None)
        if was is None:
            yield _normal("GangCreated", f"gang {gang.name}, revision {gang.revision}")
        yield from _of_gang(was or gang.model_copy(update={"ready": False, "restart": None, "failure": None}), gang)
    for name in sorted(earlier):
        yield _normal("GangRemoved", f"gang {name} and its pods are gone")


def _of_gang(was: GangStatus, gang: GangStatus) -> Iterator[Event]:
    if gang.phase == "Draining" and was.phase != "Draining":
        yield _normal("GangDraining", f"gang {gang.name} finishes its streams")
    for fault in chronicle.added(was.faults, gang.faults):
        yield _warning("GangFault", f"gang {gang.name}, epoch {fault.epoch}: {fault.kind}: {fault.message}")
    for rebuild in chronicle.added(was.rebuilds, gang.rebuilds):
        yield _normal(
            "GangRebuilt",
            f"gang {gang.name} has a new world, epoch {rebuild.epoch}, {rebuild.milliseconds} ms after the fault was "
            f"seen ({rebuild.kind}); {rebuild.replayed_requests} requests went on",
        )
    yield from _of_weights(was, gang)
    restart = gang.last_restart
    if restart is not None and (was.last_restart is None or was.last_restart.attempt != restart.attempt):
        wait = f", not before {gang.restart.not_before}" if gang.restart is not None and gang.restart.not_before else ""
        yield _warning(
            "GangRestart",
            f"gang {gang.name} restarts at attempt {restart.attempt}{wait}: {restart.cause}: {restart.message}",
        )
    if gang.failure is not None and was.failure is None:
        yield _warning(
            "GangFailed",
            f"gang {gang.name} is left alone ({gang.failure.reason}): {gang.failure.cause}: {gang.failure.message}",
        )
    if gang.failure is None and was.failure is not None and gang.ready:
        yield _normal("GangRecovered", f"gang {gang.name} has become ready by itself")
    if gang.ready and not was.ready:
        yield _normal("GangReady", f"gang {gang.name} takes requests, attempt {gang.attempt}")
    if was.ready and not gang.ready:
        yield _warning("GangNotReady", f"gang {gang.name} takes no requests, it is {gang.phase}")


def _of_weights(was: GangStatus, gang: GangStatus) -> Iterator[Event]:
    if gang.weights_version and gang.weights_version != was.weights_version:
        yield _normal("WeightsCommitted", f"gang {gang.name} serves version {gang.weights_version} of the weights")
    error = gang.weights_keeping_error
    if error and error != was.weights_keeping_error:
        yield _warning("WeightsNotKept", f"gang {gang.name} serves weights that are lost with its pods: {error}")
    condition = gang.weights_condition
    if condition in (weights.INCOMPLETE, weights.LOST) and condition != was.weights_condition:
        yield _warning(condition, f"gang {gang.name}: {gang.weights_message}; {conditions.WEIGHTS_REMEDY}")


def _condition(status: TPModelStatus, kind: str) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)


def _held(status: TPModelStatus, kind: str) -> bool:
    condition = _condition(status, kind)
    return condition is not None and condition.status == "True"


def _normal(reason: str, message: str) -> Event:
    return Event(type="Normal", reason=reason, message=message)


def _warning(reason: str, message: str) -> Event:
    return Event(type="Warning", reason=reason, message=message)
