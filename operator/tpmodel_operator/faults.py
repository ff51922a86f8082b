"""What counts as a fault of a gang, read from its pods, and what is done about each kind.

Everything is a level, not an edge: an operator that was away finds the same faults, by the UIDs and the container
ends that status has recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, StrEnum

from tpmodel_operator import clock, formation
from tpmodel_operator.circumstances import Circumstances, grace_end
from tpmodel_operator.gangs import Gang
from tpmodel_operator.observed import PodRecord

EXIT_DRAINED = 0
EXIT_CONFIGURATION = 64
EXIT_RESTART_GANG = 75
STALE_ATTEMPT = "stale attempt:"
"""How the cause begins when a supervisor ended since its gang is at a higher attempt: its container starts again."""

LEADER_PATIENCE = 60
"""Seconds beyond recovery.deadline that a leader pod may be not Ready."""

ENDED_PHASES = ("Failed", "Succeeded")


class Cause(StrEnum):
    """The kinds of faults, as status, Events and metrics name them."""

    CONFIGURATION_REFUSED = "ConfigurationRefused"
    """The container ended with 64."""
    RESTART_REQUESTED = "RestartRequested"
    """The container ended with 75."""
    CONTAINER_ENDED = "ContainerEnded"
    """The container ended with anything else."""
    POD_DELETED = "PodDeleted"
    """A pod was deleted, and is gone, or its container has ended, or its grace period is over."""
    POD_ENDED = "PodEnded"
    """A pod was evicted or refused by its node."""
    POD_LOST = "PodLost"
    """A pod is gone, or another one has its name, and nobody saw it end."""
    NODE_LOST = "NodeLost"
    """A pod's node is not ready, for longer than is tolerated."""
    LEADER_NOT_READY = "LeaderNotReady"
    FORMATION_DEADLINE = "FormationDeadline"
    TOKEN_LOST = "TokenLost"  # noqa: S105 - the name of a cause


class Answer(Enum):
    """What the operator does about a fault."""

    RESTART = "coordinated restart"
    FAIL = "Failed at once, no retry"


ANSWERS: dict[str, dict[Cause, Answer]] = {
    "Restart": {
        Cause.CONFIGURATION_REFUSED: Answer.FAIL,
        Cause.RESTART_REQUESTED: Answer.RESTART,
        Cause.CONTAINER_ENDED: Answer.RESTART,
        Cause.POD_DELETED: Answer.RESTART,
        Cause.POD_ENDED: Answer.RESTART,
        Cause.POD_LOST: Answer.RESTART,
        Cause.NODE_LOST: Answer.RESTART,
        Cause.LEADER_NOT_READY: Answer.RESTART,
        Cause.FORMATION_DEADLINE: Answer.RESTART,
        Cause.TOKEN_LOST: Answer.RESTART,
    },
    "InPlace": {
        Cause.CONFIGURATION_REFUSED: Answer.FAIL,
        Cause.RESTART_REQUESTED: Answer.RESTART,
        Cause.LEADER_NOT_READY: Answer.RESTART,
        Cause.FORMATION_DEADLINE: Answer.RESTART,
        Cause.TOKEN_LOST: Answer.RESTART,
    },
}
"""Who restarts what, by spec.recovery.mode. A cause that a mode leaves to supervisors, kubelet and StatefulSet has no
entry: it is no fault there. The spec's present mode counts, also for a gang that was made with the other one: its
pods then end with 75 where they cannot go on, or are restarted though they could."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault."""

    cause: Cause
    message: str
    exit_code: int | None = None


def ends(pod: PodRecord) -> int:
    """How often the worker's container has ended: restarts, and the end that no restart has followed yet."""
    return pod.restart_count + (1 if pod.ended is not None and not pod.running else 0)


def find(gang: Gang, around: Circumstances) -> Fault | None:
    """The fault to answer, the gravest first; None: there is none."""
    answered = ANSWERS[around.recovery.mode]
    return next((fault for fault in _faults(gang, around) if fault.cause in answered), None)


def refused_configuration(gang: Gang) -> Fault | None:
    """A container that has ended with 64, since the last pass."""
    return next(_refused_configurations(gang), None)


def wakeups(gang: Gang, around: Circumstances) -> Iterator[datetime]:
    """When time alone may make a fault, or end a pod that nobody else will."""
    for pod in gang.pods:
        if pod.deleting_since is not None and (given_up := around.node_given_up(pod)) is not None:
            yield given_up
    if not gang.status.formed:
        deadline = formation.deadline(gang, around.recovery)
        if deadline is not None and not formation.is_complete(gang):
            yield deadline
        return
    if gang.status.incomplete_since and (deadline := formation.deadline(gang, around.recovery)) is not None:
        yield deadline
    draining = False
    for pod in gang.pods:
        over = grace_end(pod)
        if over is not None:
            draining = draining or over > around.now
            yield over
    if not draining and (patience := _leader_deadline(gang, around)) is not None:
        yield patience


def _faults(gang: Gang, around: Circumstances) -> Iterator[Fault]:
    yield from _refused_configurations(gang)
    if gang.token_missing and any(formation.has_started(pod) for pod in gang.pods):
        yield Fault(cause=Cause.TOKEN_LOST, message="the Secret with the gang's token was gone")
    if not gang.status.formed:
        yield from _while_forming(gang, around)
        return
    for pod in gang.pods:
        yield from _of_pod(gang, pod, around)
    yield from _lost(gang)
    yield from _not_made_again(gang, around)
    yield from _leader(gang, around)


def _refused_configurations(gang: Gang) -> Iterator[Fault]:
    for pod in gang.pods:
        if pod.deleting_since is None and _unanswered(gang, pod) == EXIT_CONFIGURATION:
            yield _of_end(pod, Cause.CONFIGURATION_REFUSED)


def _while_forming(gang: Gang, around: Circumstances) -> Iterator[Fault]:
    if formation.is_complete(gang):
        # What ended before the gang was complete is over; what is down now is a fault of the complete gang.
        newest = max(pod.created for pod in gang.pods)
        for pod in gang.pods:
            early = pod.ended is not None and pod.ended.time is not None and pod.ended.time < newest
            if not pod.running and not early:
                yield from _of_pod(gang, pod, around)
        return
    yield from _formation(gang, around)


def _formation(gang: Gang, around: Circumstances) -> Iterator[Fault]:
    deadline = formation.deadline(gang, around.recovery)
    if deadline is not None and deadline <= around.now:
        yield Fault(
            cause=Cause.FORMATION_DEADLINE,
            message=f"nothing changed for {around.recovery.formation_deadline} s while waiting for "
            f"{formation.what_is_missing(gang)}",
        )


def _not_made_again(gang: Gang, around: Circumstances) -> Iterator[Fault]:
    """A pod that was lost gets as long for a node and an image as those of a new gang."""
    if gang.status.incomplete_since and not formation.is_complete(gang):
        yield from _formation(gang, around)


def _of_pod(gang: Gang, pod: PodRecord, around: Circumstances) -> Iterator[Fault]:
    if pod.deleting_since is not None:
        yield from _of_terminating(gang, pod, around)
    elif pod.phase in ENDED_PHASES:
        yield Fault(cause=Cause.POD_ENDED, message=f"pod {pod.name} is {pod.phase}", exit_code=_unanswered(gang, pod))
    elif (exit_code := _unanswered(gang, pod)) == EXIT_DRAINED and (deleted := _terminating(gang)) is not None:
        yield Fault(cause=Cause.POD_DELETED, message=f"pod {deleted.name} was deleted, its gang has drained")
    elif exit_code is not None:
        yield _of_end(pod, Cause.RESTART_REQUESTED if exit_code == EXIT_RESTART_GANG else Cause.CONTAINER_ENDED)


def _of_terminating(gang: Gang, pod: PodRecord, around: Circumstances) -> Iterator[Fault]:
    """It is draining, not lost, until its container has ended or nothing of it can be expected any more."""
    if around.on_dead_node(pod):
        yield Fault(cause=Cause.NODE_LOST, message=f"pod {pod.name}: node {pod.node} is not ready")
    elif _unanswered(gang, pod) is not None and not pod.running:
        yield Fault(cause=Cause.POD_DELETED, message=f"pod {pod.name} was deleted, its container has ended")
    elif pod.phase in ENDED_PHASES:
        yield Fault(cause=Cause.POD_DELETED, message=f"pod {pod.name} was deleted and is {pod.phase}")
    elif (over := grace_end(pod)) is not None and over <= around.now:
        yield Fault(cause=Cause.POD_DELETED, message=f"pod {pod.name} was deleted, its grace period is over")


def _terminating(gang: Gang) -> PodRecord | None:
    return next((pod for pod in gang.pods if pod.deleting_since is not None), None)


def _lost(gang: Gang) -> Iterator[Fault]:
    present = {pod.uid for pod in gang.pods}
    for pod in gang.status.pods:
        if pod.uid in present:
            continue
        if pod.terminating:
            yield Fault(cause=Cause.POD_DELETED, message=f"pod {pod.name} was deleted")
        else:
            yield Fault(cause=Cause.POD_LOST, message=f"pod {pod.name} with UID {pod.uid} is gone")


def _leader(gang: Gang, around: Circumstances) -> Iterator[Fault]:
    """Only once it has been Ready: loading takes what it takes. While a pod drains, its leader is not Ready."""
    deadline = _leader_deadline(gang, around)
    if deadline is None or deadline > around.now or _drains(gang, around):
        return
    yield Fault(
        cause=Cause.LEADER_NOT_READY, message=f"the leader pod is not Ready since {gang.status.not_ready_since}"
    )


def _drains(gang: Gang, around: Circumstances) -> bool:
    return any((over := grace_end(pod)) is not None and over > around.now for pod in gang.pods)


def _leader_deadline(gang: Gang, around: Circumstances) -> datetime | None:
    """None while a pod is made again, or loads for the first time: that is forming, which has deadlines of its own. And
    while the leader says that its weights keep it from serving: a restart would only lose what is left of them."""
    since = clock.moment(gang.status.not_ready_since)
    if (
        since is None
        or gang.status.weights_condition
        or gang.status.incomplete_since
        or any(_is_new(pod, gang, since) for pod in gang.pods)
    ):
        return None
    return clock.later(since, around.recovery.deadline + LEADER_PATIENCE)


def _is_new(pod: PodRecord, gang: Gang, since: datetime) -> bool:
    """Whether the pod has taken the place of one whose loss made the leader not Ready, which shows a little later, and
    has not been part of a Ready gang. One whose container has ended already is like any other."""
    last_ready = clock.moment(gang.status.was_ready_since) or since
    return pod.created > max(last_ready, clock.later(since, -LEADER_PATIENCE)) and ends(pod) == 0


def _unanswered(gang: Gang, pod: PodRecord) -> int | None:
    """Exit code of the newest end that no pass has dealt with; None: there is none, or it was no fault."""
    handled = next((end.restart_count for end in gang.status.handled if end.uid == pod.uid), 0)
    if pod.ended is None or ends(pod) <= handled or pod.ended.message.startswith(STALE_ATTEMPT):
        return None
    return pod.ended.exit_code


def _of_end(pod: PodRecord, cause: Cause) -> Fault:
    ended = pod.ended
    if ended is None:
        raise ValueError(f"the container of {pod.name} has not ended")
    words = f": {ended.message}" if ended.message else ""
    return Fault(
        cause=cause,
        message=f"pod {pod.name}: its container ended with {ended.exit_code}{words}",
        exit_code=ended.exit_code,
    )
