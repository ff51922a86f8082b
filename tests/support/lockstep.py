"""A world of ranks as threads of one process, whose collectives wait for each other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from tpmodel_worker.comm.communicator import Communicator

Result = TypeVar("Result")


class LockstepCommunicator(Communicator):
    """One rank of a LockstepWorld."""

    def __init__(self, rank: int, slots: list[torch.Tensor | None], barrier: threading.Barrier) -> None:
        self.name = "lockstep"
        self.rank = rank
        self.world_size = len(slots)
        self.device = torch.device("cpu")
        self.all_reduces = 0
        self._slots = slots
        self._barrier = barrier

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        self.all_reduces += 1
        tensor.copy_(self._all_gather(tensor).sum(0))

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self._slots[self.rank] = tensor
        self._barrier.wait(30)
        gathered = torch.stack([slot for slot in self._slots if slot is not None])
        self._barrier.wait(30)
        return gathered

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        tensor.copy_(self._all_gather(tensor)[root])

    def abort(self, reason: str) -> None:
        self._barrier.abort()

    def close(self) -> None:
        pass


class LockstepWorld:
    """Runs a function on every rank at once."""

    def __init__(self, world_size: int) -> None:
        slots: list[torch.Tensor | None] = [None] * world_size
        self._barrier = threading.Barrier(world_size)
        self.communicators = [LockstepCommunicator(rank, slots, self._barrier) for rank in range(world_size)]

    def run(self, function: Callable[[LockstepCommunicator], Result]) -> list[Result]:
        """The ranks' results, in order. A rank that raises ends the others' collectives."""

        def guarded(communicator: LockstepCommunicator) -> Result:
            try:
                # Threads do not inherit the mode of the one that starts them.
                with torch.inference_mode():
                    return function(communicator)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(len(self.communicators)) as threads:
            return list(threads.map(guarded, self.communicators))
