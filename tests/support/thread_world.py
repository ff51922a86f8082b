"""A shared-memory world whose ranks are threads of one process: the library lets go of the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self, TypeVar

import torch

from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.shared_memory import SharedMemoryCommunicator
from tpmodel_worker.comm.shared_memory_library import load_library

CPU = torch.device("cpu")
T = TypeVar("T")


class ThreadWorld:
    """Arenas of all ranks, and a communicator for each; a context manager."""

    def __init__(
        self, world_size: int, *, epoch: int = 7, slot_bytes: int = 4096, deadline_seconds: float = 20.0
    ) -> None:
        self.world_size = world_size
        self.slot_bytes = slot_bytes
        self.deadline_seconds = deadline_seconds
        size = load_library().tpmodel_arena_bytes(slot_bytes)
        self.arenas = [Arena.create(ArenaId(rank, "comm"), size, CPU) for rank in range(world_size)]
        self.communicators: list[SharedMemoryCommunicator] = []
        self.begin(epoch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for communicator in self.communicators:
            communicator.close()
        for arena in self.arenas:
            arena.close()

    def begin(self, epoch: int) -> None:
        """Every rank leaves its epoch and joins this one, over the same arenas."""
        for communicator in self.communicators:
            communicator.close()
        for rank in range(self.world_size):
            self.reset(rank, epoch)
        self.communicators = [self._join(rank, epoch) for rank in range(self.world_size)]

    def reset(self, rank: int, epoch: int) -> None:
        """What a rank does to its own arena at a new epoch."""
        load_library().tpmodel_arena_reset(self.arenas[rank].bytes.data_ptr(), self.slot_bytes, epoch)

    def run(self, part: Callable[[SharedMemoryCommunicator], T], ranks: list[int] | None = None) -> list[T]:
        """Runs one rank's part on all ranks (or some) at once; the results by rank, or the first exception."""
        communicators = self.communicators if ranks is None else [self.communicators[rank] for rank in ranks]
        with ThreadPoolExecutor(len(communicators)) as threads:
            futures = [threads.submit(part, communicator) for communicator in communicators]
            return [future.result() for future in futures]

    def start(self, pool: ThreadPoolExecutor, rank: int, part: Callable[[SharedMemoryCommunicator], Any]) -> Any:
        """Runs one rank's part beside the caller; a future."""
        return pool.submit(part, self.communicators[rank])

    def _join(self, rank: int, epoch: int) -> SharedMemoryCommunicator:
        arenas = [Arena.map(arena.id, os.dup(arena.descriptor), arena.size, CPU) for arena in self.arenas]
        return SharedMemoryCommunicator(
            rank=rank,
            epoch=epoch,
            arenas=arenas,
            slot_bytes=self.slot_bytes,
            deadline_seconds=self.deadline_seconds,
        )
