"""The process group of weight updates, of either transport."""

from __future__ import annotations

import contextlib
import threading

from tpmodel_worker.comm.build import build_communicator
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.comm.proof import prove_membership
from tpmodel_worker.weights.indexed_group import IndexedGroups, join_indexed_groups
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.ranks import TRAINER
from tpmodel_worker.weights.rehearsal import rehearse

_RENDEZVOUS_ID = "weight update"

UpdateGroup = Communicator | IndexedGroups


def join_group(
    member: GroupMember, *, indexed: bool, key: str, cancelled: threading.Event | None = None
) -> UpdateGroup:
    """Joins the group of the transport; see join_update_group and join_indexed_groups."""
    if indexed:
        return join_indexed_groups(member, cancelled=cancelled)
    return join_update_group(member, key=key, cancelled=cancelled)


def join_update_group(member: GroupMember, *, key: str, cancelled: threading.Event | None = None) -> Communicator:
    """Joins; returns once every member has, and has proved to know the key. All members call it at the same time.

    Args:
        member: who joins, and where.
        key: what all members know, the same for all (auth.update_group_key).
        cancelled: another thread may set it to end the joining.

    Raises:
        CommunicatorError: a member did not come, or has another key.
        TimeoutError: the device has not finished what is rehearsed.
    """
    with contextlib.ExitStack() as undo:
        group = build_communicator(member.spec(_RENDEZVOUS_ID), device=member.device, arenas=None, cancelled=cancelled)
        undo.callback(_discard, group)
        prove_membership(group, key, _RENDEZVOUS_ID)
        if member.rehearsal is not None:
            sends = member.rank == TRAINER
            rehearse(group, member.rehearsal, sends=sends, deadline_seconds=member.timeout_seconds)
        undo.pop_all()
    return group


def _discard(group: Communicator) -> None:
    group.abort("the group could not be joined")
    group.close()
