"""A gang's last faults and rebuilds, as status keeps them: what its engine reports, and what earlier ones reported."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from tpmodel_operator import clock
from tpmodel_operator.api_status import KEPT, GangFault, GangRebuild, GangStatus
from tpmodel_operator.observed import GangReport, ReportedFault, ReportedRebuild

LONGEST = 240
"""Characters of a message."""

E = TypeVar("E", GangFault, GangRebuild)


def continued(status: GangStatus, report: GangReport) -> dict[str, object]:
    """Both histories with what the report adds. An engine that starts anew reports none; what was is kept."""
    return {
        "faults": _merged(
            status.faults, map(_fault, report.faults), key=lambda fault: (fault.time, fault.epoch, fault.kind)
        ),
        "rebuilds": _merged(status.rebuilds, map(_rebuild, report.rebuilds), key=lambda rebuild: rebuild.epoch),
    }


def added(before: list[E], after: list[E]) -> list[E]:
    """Entries that are new."""
    return [entry for entry in after if entry not in before]


def _merged(known: list[E], reported: Iterable[E], *, key: Callable[[E], Hashable]) -> list[E]:
    entries = {key(entry): entry for entry in known} | {key(entry): entry for entry in reported}
    return sorted(entries.values(), key=lambda entry: (entry.time, entry.epoch))[-KEPT:]


def _fault(fault: ReportedFault) -> GangFault:
    message = fault.message if len(fault.message) <= LONGEST else fault.message[: LONGEST - 3] + "..."
    return GangFault(time=clock.text(fault.time), epoch=fault.epoch, kind=fault.kind, message=message)


def _rebuild(rebuild: ReportedRebuild) -> GangRebuild:
    return GangRebuild(
        time=clock.text(rebuild.time),
        epoch=rebuild.epoch,
        kind=rebuild.kind,
        milliseconds=round(1000 * rebuild.seconds),
        replayed_requests=rebuild.replayed_requests,
    )
