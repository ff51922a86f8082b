"""One gang's turn in a pass: what it is up to, whether anything is wrong, and what is done about it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Literal

from tpmodel_operator import chronicle, clock, faults, formation, restarts
from tpmodel_operator.actions import Action
from tpmodel_operator.api import Failure, GangPod, GangStatus, HandledEnd
from tpmodel_operator.circumstances import Circumstances
from tpmodel_operator.faults import Answer, Fault
from tpmodel_operator.gangs import Existence, Gang, is_current, told
from tpmodel_operator.observed import PodRecord
from tpmodel_operator.restarts import Judged

Phase = Literal["Pending", "Forming", "Loading", "Serving", "Rebuilding", "Draining", "Restarting", "Failed"]


def judge(gang: Gang, around: Circumstances) -> Judged:
    """The gang's new status, and what brings it there."""
    if gang.existence is Existence.LEAVING:
        return leave(gang, around)
    if gang.existence is not Existence.LIVE:
        return Judged(status=gang.status)
    gang = _with(gang, _readiness(gang, around))
    if gang.status.restart is not None:
        judged = _restarting(gang, around)
    elif gang.status.failure is not None:
        judged = _failed(gang, around)
    else:
        judged = _watched(gang, around)
    return _described(gang, judged)


def leave(gang: Gang, around: Circumstances) -> Judged:
    """A gang that ends: its pods drain, and nothing about it is a fault any more.

    What is remembered stays until its StatefulSet ends in fact: the spec may be set back before.
    """
    ending: dict[str, object] = {"phase": "Draining", "ready": False}
    if gang.statefulset is None or gang.statefulset.deleting:
        ending |= {"restart": None, "pods": _seen(gang.pods)}
    return Judged(
        status=gang.status.model_copy(update=ending),
        actions=tuple(restarts.freed(gang.pods, around)),
        wakeups=tuple(given_up for pod in gang.pods if (given_up := around.node_given_up(pod)) is not None),
    )


def _watched(gang: Gang, around: Circumstances) -> Judged:
    """A gang that forms, loads or serves."""
    fault = faults.find(gang, around)
    if fault is not None:
        return _answer(gang, fault, around)
    seen = _formed(gang, around) | {"handled": _ends(gang)}
    gang = _with(gang, _refunded(gang.status, around).model_copy(update=seen))
    wakeups = list(faults.wakeups(gang, around))
    if gang.status.restarts and (stable := _stable_from(gang.status, around)) is not None:
        wakeups.append(stable)
    actions = (*_attempt_kept(gang), *restarts.freed(gang.pods, around))
    return Judged(status=gang.status, actions=actions, wakeups=tuple(wakeups))


def _formed(gang: Gang, around: Circumstances) -> dict[str, object]:
    """Whether all its containers have started in this attempt, and since when one that had is missing again."""
    if formation.is_complete(gang):
        return {"formed": True, "incomplete_since": ""}
    if not gang.status.formed:
        return {"formed": False}
    return {"formed": True, "incomplete_since": gang.status.incomplete_since or clock.text(around.now)}


def _answer(gang: Gang, fault: Fault, around: Circumstances) -> Judged:
    answer = faults.ANSWERS[around.recovery.mode][fault.cause]
    missed = gang.status.deadline_missed or fault.cause is faults.Cause.FORMATION_DEADLINE
    gang = _with(gang, gang.status.model_copy(update={"handled": _ends(gang), "deadline_missed": missed}))
    if answer is Answer.FAIL:
        return _fail(gang, fault, "ConfigurationRefused", around)
    if gang.status.restarts >= around.recovery.max_restarts:
        return _fail(gang, fault, "BudgetSpent", around)
    return restarts.decide(gang, fault, around)


def _fail(
    gang: Gang, fault: Fault, reason: Literal["ConfigurationRefused", "BudgetSpent"], around: Circumstances
) -> Judged:
    failure = Failure(
        reason=reason,
        cause=fault.cause,
        message=fault.message,
        exit_code=fault.exit_code,
        time=clock.text(around.now),
    )
    return Judged(status=gang.status.model_copy(update={"failure": failure, "restart": None}))


def _failed(gang: Gang, around: Circumstances) -> Judged:
    """It is left alone, but its containers still start again: a Secret put right may heal it."""
    failure = gang.status.failure
    if gang.status.ready:
        healed = {"failure": None, "formed": True, "handled": _ends(gang)}
        return _watched(_with(gang, gang.status.model_copy(update=healed | {"pods": _seen(gang.pods)})), around)
    budget_left = gang.status.restarts < around.recovery.max_restarts
    if failure is not None and failure.reason == "BudgetSpent" and budget_left:
        fault = Fault(cause=faults.Cause(failure.cause), message=failure.message, exit_code=failure.exit_code)
        return restarts.decide(gang, fault, around)
    return Judged(status=gang.status.model_copy(update={"handled": _ends(gang)}), actions=_attempt_kept(gang))


def _restarting(gang: Gang, around: Circumstances) -> Judged:
    """Whatever ends meanwhile belongs to this restart, also a pod made early that has lost its doomed peers."""
    refused = faults.refused_configuration(gang)
    if refused is not None:
        return _answer(gang, refused, around)
    gang = _with(gang, gang.status.model_copy(update={"handled": _ends(gang)}))
    judged = restarts.proceed(gang, gang.status, around)
    if judged.status.restart is not None:
        return judged
    gang = _with(gang, judged.status.model_copy(update={"pods": _seen(gang.pods)}))
    over = _watched(gang, around)
    return replace(over, actions=judged.actions + over.actions)


def _attempt_kept(gang: Gang) -> tuple[Action, ...]:
    """The ConfigMap lost, or behind: without it no pod starts, with an old one a pod starts in vain."""
    waits = any(not formation.has_started(pod) for pod in gang.pods)
    behind = waits if gang.known is None else gang.is_behind(gang.status)
    return (told(gang.status),) if behind else ()


def _readiness(gang: Gang, around: Circumstances) -> GangStatus:
    """A gang is Ready when its leader pod is, and stays."""
    status = gang.status
    began = status.restart is not None and bool(status.restart.began)
    doomed = status.restart.doomed if status.restart is not None and began else []
    leader = next((pod for pod in gang.pods if pod.index == 0 and pod.uid not in doomed), None)
    ready = leader is not None and leader.ready and leader.deleting_since is None
    # One that is being deleted while Ready changed its condition when it became so, which may be long ago.
    told = leader.ready_changed if leader is not None and leader.ready == ready else None
    changed = clock.text(told or around.now)
    if ready:
        since = status.ready_since or changed
        return status.model_copy(
            update={"ready": True, "ready_since": since, "not_ready_since": "", "deadline_missed": False}
        )
    if status.ready_since:
        lost = {"ready": False, "ready_since": "", "not_ready_since": changed, "was_ready_since": status.ready_since}
        return status.model_copy(update=lost)
    return status.model_copy(update={"ready": False})


def _refunded(status: GangStatus, around: Circumstances) -> GangStatus:
    """The whole budget back, for a gang that has been Ready for the stability window."""
    stable = _stable_from(status, around)
    return status.model_copy(update={"restarts": 0}) if stable is not None and stable <= around.now else status


def _stable_from(status: GangStatus, around: Circumstances) -> datetime | None:
    since = clock.moment(status.ready_since)
    return None if since is None else clock.later(since, around.recovery.stability_window)


def _described(gang: Gang, judged: Judged) -> Judged:
    """With what is shown only."""
    shown: dict[str, object] = {"pods": _seen(gang.pods), "phase": _phase(gang, judged.status)}
    report = gang.report
    if report is not None and is_current(report, judged.status):
        shown |= {"epoch": report.epoch, "ready_ranks": report.ready_ranks, "load_percent": report.load_percent}
        shown |= chronicle.continued(judged.status, report)
    return replace(judged, status=judged.status.model_copy(update=shown))


def _phase(gang: Gang, status: GangStatus) -> Phase:
    if status.failure is not None:
        return "Failed"
    if status.restart is not None:
        return "Restarting"
    if not gang.pods:
        return "Pending"
    if not status.formed:
        return "Forming"
    if any(pod.deleting_since is not None for pod in gang.pods):
        return "Draining"
    if status.ready:
        return "Serving"
    return "Rebuilding" if status.not_ready_since else "Loading"


def _seen(pods: tuple[PodRecord, ...]) -> list[GangPod]:
    return [
        GangPod(
            name=pod.name,
            uid=pod.uid,
            ready=pod.ready,
            node=pod.node,
            terminating=pod.deleting_since is not None,
        )
        for pod in pods
    ]


def _ends(gang: Gang) -> list[HandledEnd]:
    """All container ends up to now, as dealt with."""
    return [HandledEnd(uid=pod.uid, restart_count=count) for pod in gang.pods if (count := faults.ends(pod)) > 0]


def _with(gang: Gang, status: GangStatus) -> Gang:
    return replace(gang, status=status)
