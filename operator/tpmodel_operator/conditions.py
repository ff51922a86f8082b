"""Conditions, as `kubectl wait`, Helm and other tools that know kstatus read them.

Ready and Stalled say how it stands, Reconciling is there only while something is under way: with them a tool that
knows nothing of gangs can tell whether to wait, to go on, or to give up. Advice is there only while there is some.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from tpmodel_operator import clock, names, weights
from tpmodel_operator.acceptance import Refusal
from tpmodel_operator.api import Condition, GangStatus
from tpmodel_operator.weights import NO_WEIGHTS, Weights

ACCEPTED = "Accepted"
READY = "Ready"
PROGRESSING = "Progressing"
DEGRADED = "Degraded"
STALLED = "Stalled"
UPGRADE_AVAILABLE = "UpgradeAvailable"
WEIGHTS_READY = "WeightsReady"
ADVICE = "Advice"
RECONCILING = "Reconciling"

LEAVING_PHASE = "Draining"

WEIGHTS_GRAVITY = ("", weights.UPDATING, weights.INCOMPLETE, weights.LOST)
WEIGHTS_REMEDY = (
    f"to go back to the checkpoint instead, write a new value into the annotation {names.RESET_WEIGHTS_ANNOTATION}"
)
"""What a trainer can do about it, the gang says itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """A model's gangs at the end of a pass."""

    wanted: int
    revision: str
    gangs: tuple[GangStatus, ...]
    """Those that are not being removed."""
    leaving: int = 0
    refusal: Refusal | None = None
    rollout_stalled: bool = False
    image: str = ""
    newer_image: str = ""
    advice: str = ""
    model_revision: str = ""
    rebuild_requested: str = ""
    weights: Weights = NO_WEIGHTS

    @property
    def ready(self) -> int:
        """Gangs that take requests."""
        return sum(gang.ready for gang in self.gangs)

    @property
    def updated(self) -> list[GangStatus]:
        """Gangs of the newest revision."""
        return [gang for gang in self.gangs if gang.revision == self.revision]

    @property
    def outdated(self) -> int:
        """Gangs of other revisions."""
        return len(self.gangs) - len(self.updated)

    @property
    def stuck(self) -> GangStatus | None:
        """A gang of the newest revision that does not get anywhere by itself."""
        return next((gang for gang in self.updated if gang.failure is not None or gang.deadline_missed), None)


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition before it has times."""

    type: str
    holds: bool
    reason: str
    message: str = ""


def conditions(before: list[Condition], situation: Situation, *, generation: int, now: datetime) -> list[Condition]:
    """All of them; a transition time moves only when the status does."""
    earlier = {condition.type: condition for condition in before}
    return [_timed(finding, earlier.get(finding.type), generation, now) for finding in findings(situation)]


def findings(situation: Situation) -> Iterator[Finding]:
    """What holds, and what does not."""
    progressing = _progressing(situation)
    yield _accepted(situation)
    yield _ready(situation)
    yield progressing
    yield _degraded(situation)
    yield _stalled(situation)
    yield _upgrade(situation)
    if (weights := _weights(situation)) is not None:
        yield weights
    if situation.advice:
        yield Finding(ADVICE, True, "NodesTooSmall", situation.advice)
    if progressing.holds:
        yield Finding(RECONCILING, True, progressing.reason, progressing.message)


def _timed(finding: Finding, before: Condition | None, generation: int, now: datetime) -> Condition:
    status = "True" if finding.holds else "False"
    kept = before.last_transition_time if before is not None and before.status == status else ""
    return Condition(
        type=finding.type,
        status=status,
        reason=finding.reason,
        message=finding.message,
        last_transition_time=kept or clock.text(now),
        observed_generation=generation,
    )


def _accepted(situation: Situation) -> Finding:
    refusal = situation.refusal
    if refusal is not None:
        return Finding(ACCEPTED, False, refusal.reason, refusal.message)
    return Finding(ACCEPTED, True, "Accepted", "the spec can be served")


def _ready(situation: Situation) -> Finding:
    if situation.wanted == 0 and situation.refusal is None:
        return Finding(READY, True, "ScaledToZero", "no gang is wanted")
    message = f"{situation.ready} of {situation.wanted} gangs are ready"
    if situation.ready >= situation.wanted > 0:
        return Finding(READY, True, "GangsReady", message)
    return Finding(READY, False, "GangsNotReady" if situation.ready else "NoGangReady", message)


def _progressing(situation: Situation) -> Finding:
    if situation.refusal is not None:
        return Finding(PROGRESSING, False, "NotAccepted", "nothing is changed while the spec is not accepted")
    if situation.stuck is not None:
        old = f"; {situation.outdated} gangs of former revisions serve on" if situation.outdated else ""
        return Finding(PROGRESSING, False, "RolloutStalled", _why_stuck(situation.stuck) + old)
    if situation.outdated:
        done = f"{len(situation.updated)} of {situation.wanted} gangs are of revision {situation.revision}"
        return Finding(PROGRESSING, True, "RollingOut", done)
    if len(situation.gangs) < situation.wanted or situation.leaving:
        scale = f"{len(situation.gangs)} of {situation.wanted} gangs exist, {situation.leaving} are leaving"
        return Finding(PROGRESSING, True, "Scaling", scale)
    waiting = [gang for gang in situation.gangs if not gang.ready]
    if waiting:
        return Finding(PROGRESSING, True, "GangsStarting", _listed(waiting))
    return Finding(PROGRESSING, False, "Complete", f"all gangs are of revision {situation.revision} and ready")


def _degraded(situation: Situation) -> Finding:
    """A gang that forms for the first time is no degradation, one that has served is."""
    failed = [gang for gang in situation.gangs if gang.failure is not None]
    if failed:
        return Finding(DEGRADED, True, "GangFailed", _listed(failed))
    restarted = [gang for gang in situation.gangs if not gang.ready and gang.last_restart is not None]
    if restarted:
        return Finding(DEGRADED, True, "GangRestarting", _listed(restarted))
    lost = [gang for gang in situation.gangs if gang.not_ready_since or gang.phase == LEAVING_PHASE]
    if lost:
        return Finding(DEGRADED, True, "GangNotReady", _listed(lost))
    return Finding(DEGRADED, False, "AsExpected")


def _stalled(situation: Situation) -> Finding:
    refusal = situation.refusal
    if refusal is not None and not refusal.transient:
        return Finding(STALLED, True, "NotAccepted", refusal.message)
    stuck = situation.stuck
    if refusal is None and stuck is not None:
        reason = stuck.failure.reason if stuck.failure is not None else "FormationDeadline"
        return Finding(STALLED, True, reason, _why_stuck(stuck))
    return Finding(STALLED, False, "NotStalled")


def _upgrade(situation: Situation) -> Finding:
    if not situation.newer_image:
        return Finding(UPGRADE_AVAILABLE, False, "UpToDate")
    return Finding(
        UPGRADE_AVAILABLE,
        True,
        "NewerDefaultImage",
        f"gangs use {situation.image}; to take the operator's default, annotate with "
        f"{names.TAKE_IMAGE_ANNOTATION}={situation.newer_image}",
    )


def _weights(situation: Situation) -> Finding | None:
    """Nothing where all gangs are at the checkpoint, as where nobody ever sends weights."""
    gangs = situation.gangs
    without = [gang for gang in gangs if gang.weights_condition]
    if without:
        gravest = max((gang.weights_condition for gang in without), key=WEIGHTS_GRAVITY.index)
        told = "; ".join(f"{gang.name}: {gang.weights_condition}: {gang.weights_message}" for gang in without[:10])
        remedy = f"; {WEIGHTS_REMEDY}" if gravest != weights.UPDATING else ""
        return Finding(WEIGHTS_READY, False, gravest, told + remedy)
    if not (situation.weights.newest or any(gang.weights_version for gang in gangs)):
        return None
    if (version := weights.all_serve(gangs)) is not None:
        return Finding(WEIGHTS_READY, True, "VersionServed", f"all gangs serve version {version}")
    versions = ", ".join(f"{gang.name} serves {_version(gang)}" for gang in gangs[:10])
    return Finding(WEIGHTS_READY, False, "VersionsDiffer", versions or "no gang serves")


def _version(gang: GangStatus) -> str:
    return "none" if gang.weights_version is None or not gang.ready else f"version {gang.weights_version}"


def _why_stuck(gang: GangStatus) -> str:
    if gang.failure is None:
        cause = gang.last_restart.message if gang.last_restart is not None else ""
        return f"gang {gang.name} has missed its formation deadline: {cause}"
    spent = "has spent its restarts" if gang.failure.reason == "BudgetSpent" else "refuses its configuration"
    return f"gang {gang.name} {spent}: {gang.failure.message}"


def _listed(gangs: list[GangStatus]) -> str:
    return ", ".join(f"{gang.name} is {gang.phase}{_why(gang)}" for gang in gangs[:10])


def _why(gang: GangStatus) -> str:
    if gang.failure is not None:
        return f" ({gang.failure.message})"
    if gang.restart is not None:
        return f" ({gang.restart.message})"
    if gang.weights_condition:
        return f" ({gang.weights_condition}: {gang.weights_message})"
    return ""
