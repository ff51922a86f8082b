"""Coordinated restarts: every pod of a gang is made again, at the next attempt.

Each step is in status before it is done, so a crash anywhere is finished by the next pass: decided (with its
backoff), begun (attempt raised, the doomed UIDs final), over (none of them is left).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from tpmodel_operator import clock
from tpmodel_operator.actions import Action, DeletePod
from tpmodel_operator.api import GangStatus, LastRestart, Recovery, Restart
from tpmodel_operator.circumstances import Circumstances, grace_end
from tpmodel_operator.faults import Fault
from tpmodel_operator.gangs import Gang, told
from tpmodel_operator.observed import PodRecord

GRACE_SECONDS = 5
"""Of a doomed pod: its streams are broken already."""

LOOK_AGAIN = 5
"""Seconds between looks at the node of a pod that should be gone: nodes are not watched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What one gang's turn in a pass came to."""

    status: GangStatus
    actions: tuple[Action, ...] = ()
    wakeups: tuple[datetime, ...] = ()


def backoff(recovery: Recovery, restarts: int) -> int:
    """Seconds to wait before the next restart, after so many in a row: the first comes at once."""
    if restarts == 0:
        return 0
    return min(recovery.backoff_base * 2 ** min(restarts - 1, 32), recovery.backoff_limit)


def decide(gang: Gang, fault: Fault, around: Circumstances) -> Judged:
    """Enters a restart into status; without a backoff it begins in the same pass."""
    status = gang.status
    now = clock.text(around.now)
    attempt = status.attempt + 1
    wait = backoff(around.recovery, status.restarts)
    restart = Restart(
        attempt=attempt,
        cause=fault.cause,
        message=fault.message,
        exit_code=fault.exit_code,
        not_before=clock.text(clock.later(around.now, wait)) if wait else "",
        started=now,
    )
    last = LastRestart(cause=fault.cause, message=fault.message, exit_code=fault.exit_code, time=now, attempt=attempt)
    counted = {
        "restart": restart,
        "last_restart": last,
        "restarts": status.restarts + 1,
        "restarts_total": status.restarts_total + 1,
        "failure": None,
    }
    return proceed(gang, status.model_copy(update=counted), around)


def proceed(gang: Gang, status: GangStatus, around: Circumstances) -> Judged:
    """The next step of the restart under way; without one in the status returned, it is over."""
    restart = status.restart
    if restart is None:
        return Judged(status=status)
    if not restart.began:
        not_before = clock.moment(restart.not_before)
        restart = restart.model_copy(update={"doomed": [pod.uid for pod in gang.pods]})
        if not_before is not None and not_before > around.now:
            return Judged(status=status.model_copy(update={"restart": restart}), wakeups=(not_before,))
        restart = restart.model_copy(update={"began": clock.text(around.now)})
        status = status.model_copy(update=_as_new(restart))
    doomed = [pod for pod in gang.pods if pod.uid in restart.doomed]
    actions: list[Action] = []
    if gang.is_behind(status):
        actions.append(told(status))
    if not doomed:
        return Judged(status=status.model_copy(update={"restart": None}), actions=tuple(actions))
    actions += deletions(doomed, around)
    return Judged(status=status, actions=tuple(actions), wakeups=tuple(_wakeups(doomed, around)))


def deletions(pods: Iterable[PodRecord], around: Circumstances) -> list[DeletePod]:
    """Those that are still needed to make these pods end soon."""
    needed = []
    for pod in pods:
        over = grace_end(pod)
        if around.on_dead_node(pod):
            needed.append(DeletePod(name=pod.name, uid=pod.uid, grace_seconds=0))
        elif over is None or over > clock.later(around.now, GRACE_SECONDS):
            needed.append(DeletePod(name=pod.name, uid=pod.uid, grace_seconds=GRACE_SECONDS))
    return needed


def freed(pods: Iterable[PodRecord], around: Circumstances) -> list[DeletePod]:
    """Deletions of terminating pods whose node is dead: nobody else will ever confirm their end."""
    return [DeletePod(name=pod.name, uid=pod.uid, grace_seconds=0) for pod in pods if around.on_dead_node(pod)]


def _as_new(restart: Restart) -> dict[str, object]:
    """What the gang's status says once its pods are being replaced."""
    return {
        "restart": restart,
        "attempt": restart.attempt,
        "formed": False,
        "ready": False,
        "ready_since": "",
        "not_ready_since": "",
        "was_ready_since": "",
        "incomplete_since": "",
        "ready_ranks": 0,
        "load_percent": 0,
        "weights_version": None,
        "weights_condition": "",
        "weights_message": "",
        "weights_kept": 0,
        "weights_keeping_error": "",
    }


def _wakeups(doomed: Iterable[PodRecord], around: Circumstances) -> Iterable[datetime]:
    for pod in doomed:
        over = grace_end(pod)
        if over is not None:
            yield max(over, clock.later(around.now, LOOK_AGAIN))
