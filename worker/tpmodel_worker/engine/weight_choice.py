"""Which version of the weights a new world loads, by what its ranks have in memory and in files.

An engine, a rank or both may have ended within the commit of a second set (mode shadow). Until every rank has taken it,
all of them have the old set; from the first confirmation on, all of them have the new one: one whole version is always
there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tpmodel.v1 import worker_pb2


def choose_version(
    found: Sequence[worker_pb2.WeightUpdateOk], *, known: int = 0, refused: Collection[int] = ()
) -> int | None:
    """The version that every rank can have; None: there is none.

    Where a second set was being committed, it is the one that was decided on as far as that is known, else the old one;
    where there is nothing to decide, the newest.

    Args:
        found: what each rank says that it has.
        known: the version that the gang is known to have committed last.
        refused: versions whose files have turned out to be bad.
    """
    common = set[int].intersection(*(_versions(reply, refused) for reply in found))
    undecided = any(reply.HasField("second_version") for reply in found)
    not_older = {version for version in common if version >= known}
    if undecided and not_older:
        return min(not_older)
    return max(common, default=None)


def own_load(
    request: worker_pb2.LoadDenseShardRequest, reply: worker_pb2.WeightUpdateOk, version: int | None
) -> worker_pb2.LoadDenseShardRequest:
    """The request to the rank that has answered so. What is in memory is never read from files."""
    own = worker_pb2.LoadDenseShardRequest()
    own.CopyFrom(request)
    in_memory = _in_memory(reply)
    if version in in_memory:
        own.held_version = version
    elif version is not None and not in_memory:
        own.persisted_version = version
    return own


def _versions(reply: worker_pb2.WeightUpdateOk, refused: Collection[int]) -> set[int]:
    return _in_memory(reply) or {0, *reply.persisted_versions}.difference(refused)


def _in_memory(reply: worker_pb2.WeightUpdateOk) -> set[int]:
    versions = {reply.held_version} if reply.HasField("held_version") else set[int]()
    return versions | ({reply.second_version} if reply.HasField("second_version") else set())
