"""Collectives among CPU ranks of one pod, through arenas that all of them map.

The work is done in shared_memory.c, whose head describes the protocol.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import torch

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import (
    CollectiveArgumentError,
    Communicator,
    CommunicatorAbortedError,
    CommunicatorError,
)
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.shared_memory_library import DATA_TYPES, Result, load_library
from tpmodel_worker.comm.specification import CommunicatorSpec

SLOT_BYTES = 1024 * 1024
"""Larger messages go in pieces of this size."""

_CPU = torch.device("cpu")

# Polls before a waiting rank gives its processor away: about what a peer's lag costs when every rank
# has a processor of its own, and next to nothing when they share.
_PAUSES = 500
_PAUSES_WHEN_SHARED = 100


class SharedMemoryCommunicator(Communicator):
    """One rank's end of the arenas of one epoch."""

    def __init__(
        self, *, rank: int, epoch: int, arenas: Sequence[Arena], slot_bytes: int, deadline_seconds: float
    ) -> None:
        """Takes over the comm arenas of all ranks, by rank, every one reset for the epoch."""
        self.name = "shared_memory"
        self.rank = rank
        self.world_size = len(arenas)
        self.device = _CPU
        self._epoch = epoch
        self._deadline_seconds = deadline_seconds
        self._reason = ""
        self._arenas = list(arenas)
        self._library = load_library()
        # From another thread abort must never meet a world that close is taking away.
        self._lock = threading.Lock()
        bases = (ctypes.c_void_p * len(arenas))(*(arena.bytes.data_ptr() for arena in arenas))
        shared = len(arenas) > len(os.sched_getaffinity(0))
        self._world: int | None = self._library.tpmodel_world_create(
            rank,
            len(arenas),
            bases,
            slot_bytes,
            epoch,
            int(deadline_seconds * 1e9),
            _PAUSES_WHEN_SHARED if shared else _PAUSES,
        )
        if self._world is None:
            raise CommunicatorError("no memory for the state of a communicator")

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        data_type = DATA_TYPES.get(tensor.dtype)
        if data_type is None:
            expected = ", ".join(str(dtype) for dtype in DATA_TYPES)
            raise CollectiveArgumentError(f"can't sum {tensor.dtype}: expected one of {expected}")
        result = self._library.tpmodel_all_reduce(self._world, tensor.data_ptr(), tensor.numel(), data_type)
        if result:
            self._raise(result, "all_reduce")

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty((self.world_size, *tensor.shape), dtype=tensor.dtype)
        result = self._library.tpmodel_all_gather(
            self._world, tensor.data_ptr(), gathered.data_ptr(), tensor.numel() * tensor.element_size()
        )
        if result:
            self._raise(result, "all_gather")
        return gathered

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        result = self._library.tpmodel_broadcast(
            self._world, tensor.data_ptr(), tensor.numel() * tensor.element_size(), root
        )
        if result:
            self._raise(result, "broadcast")

    def check_tensor(self, index: int, tensor: torch.Tensor) -> None:
        """As everywhere; a closed communicator has no memory left to work with."""
        if self._world is None:
            raise CommunicatorError(f"rank {self.rank}: the communicator of epoch {self._epoch} is closed")
        super().check_tensor(index, tensor)

    def abort(self, reason: str) -> None:
        """Releases the computing thread from any collective, now and later. Idempotent."""
        with self._lock:
            if self._world is None:
                return
            self._reason = self._reason or reason
            self._library.tpmodel_world_abort(self._world)

    def close(self) -> None:
        """Unmaps all arenas. From the computing thread. Idempotent."""
        with self._lock:
            if self._world is None:
                return
            self._library.tpmodel_world_destroy(self._world)
            self._world = None
        for arena in self._arenas:
            arena.close()

    def _raise(self, result: int, operation: str) -> None:
        sequence = self._library.tpmodel_world_sequence(self._world)
        peer = self._library.tpmodel_world_failed_peer(self._world)
        where = f"rank {self.rank}: {operation} {sequence} of epoch {self._epoch}"
        match Result(result):
            case Result.ABORTED:
                raise CommunicatorAbortedError(f"{where} was aborted: {self._reason}")
            case Result.DEADLINE:
                raise CommunicatorError(f"{where}: rank {peer} did not come within {self._deadline_seconds} s")
            case Result.EPOCH:
                raise CommunicatorError(f"{where}: rank {peer} has left the epoch")
            case _:
                raise CommunicatorError(f"{where}: rank {peer} called another collective, or with another size")


def build_shared_memory(
    spec: CommunicatorSpec, *, arenas: ArenaClient, meeting: Meeting, slot_bytes: int = SLOT_BYTES
) -> SharedMemoryCommunicator:
    """Resets this rank's comm arena for the epoch, maps those of its peers, and joins them.

    Nobody maps a peer's arena before every rank has reset its own, so no signal of an older epoch
    is ever seen.

    Raises:
        CommunicatorError: a peer did not come, or its arena is not what it should be.
        ArenaError: memory could not be had.
    """
    opened: list[Arena] = []
    try:
        own = _prepare_own_arena(spec, arenas, slot_bytes)
        opened.append(own)
        meeting.wait_for_all("arena reset")
        by_rank: list[Arena] = []
        for rank in range(spec.world_size):
            if rank == spec.rank:
                by_rank.append(own)
                continue
            meeting.remaining()
            peer = _fetch_arena(ArenaId(rank, "comm"), arenas)
            opened.append(peer)
            _check_peer_arena(peer, spec.epoch, slot_bytes)
            by_rank.append(peer)
        return SharedMemoryCommunicator(
            rank=spec.rank,
            epoch=spec.epoch,
            arenas=by_rank,
            slot_bytes=slot_bytes,
            deadline_seconds=spec.deadline_seconds,
        )
    except (ArenaError, CommunicatorError):
        for arena in opened:
            arena.close()
        raise


def _prepare_own_arena(spec: CommunicatorSpec, arenas: ArenaClient, slot_bytes: int) -> Arena:
    """The arena of the epoch before where there is one (peers may still map it), else a new one; reset."""
    library = load_library()
    arena_id = ArenaId(spec.rank, "comm")
    needed: int = library.tpmodel_arena_bytes(slot_bytes)
    arena = _fetch_own_arena(arena_id, arenas, needed)
    if arena is None:
        arena = Arena.create(arena_id, needed, _CPU)
        try:
            library.tpmodel_arena_reset(arena.bytes.data_ptr(), slot_bytes, spec.epoch)
            arenas.store(arena, worker_pb2.ArenaManifest())
        except ArenaError:
            arena.close()
            raise
        return arena
    library.tpmodel_arena_reset(arena.bytes.data_ptr(), slot_bytes, spec.epoch)
    return arena


def _fetch_own_arena(arena_id: ArenaId, arenas: ArenaClient, needed: int) -> Arena | None:
    stored = arenas.fetch(arena_id)
    if stored is None:
        return None
    descriptor, manifest = stored
    if manifest.bytes >= needed:
        return Arena.map(arena_id, descriptor, manifest.bytes, _CPU)
    os.close(descriptor)
    arenas.release(arena_id)
    return None


def _fetch_arena(arena_id: ArenaId, arenas: ArenaClient) -> Arena:
    stored = arenas.fetch(arena_id)
    if stored is None:
        raise CommunicatorError(f"the supervisor has no {arena_id}")
    descriptor, manifest = stored
    return Arena.map(arena_id, descriptor, manifest.bytes, _CPU)


def _check_peer_arena(arena: Arena, epoch: int, slot_bytes: int) -> None:
    library = load_library()
    if arena.size < library.tpmodel_arena_bytes(slot_bytes):
        raise CommunicatorError(f"{arena.id} has {arena.size} bytes, too few for slots of {slot_bytes}")
    result = library.tpmodel_arena_check(arena.bytes.data_ptr(), slot_bytes, epoch)
    if result == Result.EPOCH:
        raise CommunicatorError(f"{arena.id} is not at epoch {epoch}")
    if result != Result.OK:
        raise CommunicatorError(f"{arena.id} has another layout than this rank's")
