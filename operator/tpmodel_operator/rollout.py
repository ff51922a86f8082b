"""Which gangs are made and which are removed: rollout, rollback and scaling are one rule.

Gangs of the newest revision are wanted `replicas` times; outdated ones make room as fast as maxUnavailable and
maxSurge allow. Going back to a former spec makes its gangs, those that are left, the newest again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice

from tpmodel_operator.api import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A gang, as far as its place in the set of gangs goes."""

    name: str
    index: int
    updated: bool
    """Whether it is of the newest revision."""
    ready: bool = False
    stuck: bool = False
    """Whether it is Failed, or has missed its formation deadline."""
    leaving: bool = False
    """Whether it is being removed, with pods still there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be done to the set of gangs."""

    create: tuple[int, ...] = ()
    """Indices of gangs to be made of the newest revision."""
    remove: tuple[str, ...] = ()
    stalled: bool = False
    """Whether a rollout has stopped at a new gang that does not become Ready."""


def plan(members: Sequence[Member], *, wanted: int, rollout: Rollout) -> Plan:
    """One step towards `wanted` gangs of the newest revision."""
    live = [member for member in members if not member.leaving]
    outdated = [member for member in live if not member.updated]
    stalled = bool(outdated) and any(member.stuck for member in live if member.updated)
    surplus = _surplus([member for member in live if member.updated], wanted)
    live = [member for member in live if member not in surplus]
    missing = 0 if stalled else _missing(members, live, wanted=wanted, rollout=rollout)
    retired = _retired(live, made=missing, wanted=wanted, rollout=rollout, stalled=stalled)
    return Plan(
        create=tuple(islice(_free_indices(members), missing)),
        remove=tuple(member.name for member in [*surplus, *retired]),
        stalled=stalled,
    )


def _surplus(updated: list[Member], wanted: int) -> list[Member]:
    """More than wanted: not Ready ones go first, then the highest index."""
    leaving_order = sorted(updated, key=lambda member: (member.ready, -member.index))
    return leaving_order[: max(0, len(updated) - wanted)]


def _missing(members: Iterable[Member], live: list[Member], *, wanted: int, rollout: Rollout) -> int:
    """Gangs to be made now. One that leaves counts until its pods are gone: its GPUs are not free before."""
    updated = [member for member in live if member.updated]
    leaving = sum(1 for member in members if member.leaving)
    replacing = len(live) > len(updated)
    room = wanted + (rollout.max_surge if replacing else 0) - len(live) - leaving
    missing = min(wanted - len(updated), room)
    if replacing:
        missing = min(missing, _most_in_flight(rollout) - _not_ready(updated))
    return max(0, missing)


def _retired(live: list[Member], *, made: int, wanted: int, rollout: Rollout, stalled: bool) -> list[Member]:
    """Outdated gangs to be removed now, those that are not Ready first.

    Of the Ready ones enough stay. One that is not Ready may be back soon, so it is only given up as far as
    maxUnavailable allows, but it never stops a rollout: the gang that replaces it counts as soon as it is Ready.
    """
    retired = []
    outdated = [member for member in live if not member.updated]
    in_flight = made + _not_ready(member for member in live if member.updated)
    existing = len(live) + made
    ready = sum(member.ready for member in live)
    hopeful = ready + _not_ready(outdated)
    for member in sorted(outdated, key=lambda member: (member.ready, -member.index)):
        too_many = existing > wanted + rollout.max_surge
        replaced_later = max(0, wanted - (existing - 1))
        if not too_many and (stalled or in_flight + replaced_later > _most_in_flight(rollout)):
            break
        if (ready if member.ready else hopeful) - 1 < wanted - rollout.max_unavailable:
            break
        retired.append(member)
        existing -= 1
        ready -= member.ready
        hopeful -= 1
    return retired


def _most_in_flight(rollout: Rollout) -> int:
    """Gangs that may be new and not Ready, or missing."""
    return rollout.max_unavailable + rollout.max_surge


def _not_ready(members: Iterable[Member]) -> int:
    return sum(not member.ready for member in members)


def _free_indices(members: Iterable[Member]) -> Iterable[int]:
    taken = {member.index for member in members}
    return (index for index in count() if index not in taken)
