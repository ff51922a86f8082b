"""Which weights gangs have: what trainers have committed into them, and what a gang that comes later is to have.

Gangs report the version that they have committed. It goes into status, then into the gang's ConfigMap, so that new
pods know that the checkpoint is not what they are to serve. A gang that comes later is told the newest version of all:
it must not join the others at the checkpoint. Versions count from a checkpoint: another model, another revision of it,
or a reset by the user begins at 0 again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime

from tpmodel_operator import clock, names
from tpmodel_operator.api import GangStatus, TPModel
from tpmodel_operator.gangs import Gang, is_current
from tpmodel_operator.observed import GangReport
from tpmodel_operator.revision import short_hash

UPDATING = "WeightsUpdating"
INCOMPLETE = "WeightsIncomplete"
LOST = "WeightsLost"
"""What a gang's leader may say of its weights."""

LONGEST = 253
"""Characters of the annotation's value that are told apart; status cannot hold any length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """What the gangs of a model are to have."""

    source: str = ""
    """Which checkpoint versions count from."""
    newest: int = 0
    """The newest version that a gang has committed; 0: the checkpoint."""
    reset: str = ""
    """What the user last wrote to go back to the checkpoint."""


NO_WEIGHTS = Weights()
"""Of a model that nothing is known of."""


def reset(model: TPModel) -> str:
    """What the user last wrote to go back to the checkpoint; an annotation that is taken away changes nothing."""
    return model.annotations.get(names.RESET_WEIGHTS_ANNOTATION, "")[:LONGEST] or model.status.weights_reset


def source(model: TPModel) -> str:
    """Hash of the checkpoint that the versions of new gangs count from."""
    checkpoint = model.spec.model
    return short_hash(
        {
            "uri": checkpoint.uri,
            "revision": checkpoint.revision,
            "loadFormat": checkpoint.load_format,
            "reset": reset(model),
        }
    )


def wanted(model: TPModel, gangs: Iterable[Gang]) -> Weights:
    """The newest version of the present checkpoint, of those that status remembers and those that gangs have."""
    present = source(model)
    remembered = model.status.weights_newest if model.status.weights_source == present else 0
    versions = [gang.status.weights_committed for gang in gangs if _counts_from(gang, model) == present]
    return Weights(source=present, newest=max([remembered, *versions]), reset=reset(model))


def remembered(model: TPModel) -> Weights:
    """What status says, for a pass that changes nothing."""
    status = model.status
    return Weights(source=status.weights_source, newest=status.weights_newest, reset=status.weights_reset)


def reported(gang: Gang, now: datetime) -> Gang:
    """The gang with what its leader says of its weights. No answer means that what was said last may still hold."""
    report, status = gang.report, gang.status
    if report is None:
        return gang
    said: dict[str, object] = {"weights_committed": max(status.weights_committed, report.weights_version)}
    if is_current(report, status):
        said |= {
            "weights_version": _served(report),
            "weights_condition": report.weights_condition,
            "weights_message": report.weights_message,
            "weights_kept": report.weights_kept,
            "weights_keeping_error": report.weights_keeping_error,
        }
        if status.weights_condition and not report.weights_condition and status.not_ready_since:
            # It has been kept from being Ready by its weights alone: its patience begins now.
            said["not_ready_since"] = clock.text(now)
    return replace(gang, status=status.model_copy(update=said))


def told(gang: Gang, weights: Weights, model: TPModel) -> Gang:
    """The gang; where it has not served in this attempt, told that it is to have the newest version."""
    status = gang.status
    has_served = status.ready_since or status.not_ready_since
    if has_served or status.weights_committed >= weights.newest or _counts_from(gang, model) != weights.source:
        return gang
    return replace(gang, status=status.model_copy(update={"weights_committed": weights.newest}))


def all_serve(gangs: Collection[GangStatus]) -> int | None:
    """The version that every gang serves; None: not all serve, or not the same."""
    versions = {gang.weights_version if gang.ready else None for gang in gangs}
    return versions.pop() if len(versions) == 1 else None


def _served(report: GangReport) -> int | None:
    """A gang that waits for an update serves the version before; one that forms has none yet."""
    loaded = report.phase in ("Serving", "Rebuilding", "Draining")
    return report.weights_version if loaded and report.weights_condition in ("", UPDATING) else None


def _counts_from(gang: Gang, model: TPModel) -> str:
    if gang.statefulset is None:
        return ""
    if not gang.statefulset.weights_source and gang.status.revision == model.status.revision:
        return model.status.weights_source
    return gang.statefulset.weights_source
