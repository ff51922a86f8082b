"""The communicator of a world of one rank: every collective is the identity, checked like the others."""

from __future__ import annotations

import threading

import torch

from tpmodel_worker.comm.communicator import Communicator, CommunicatorAbortedError


class SingleCommunicator(Communicator):
    """World size 1."""

    def __init__(self, device: torch.device) -> None:
        self.name = "single"
        self.rank = 0
        self.world_size = 1
        self.device = device
        self._aborted = threading.Event()
        self._reason = ""

    def check_tensor(self, index: int, tensor: torch.Tensor) -> None:
        """As in any world, an aborted epoch also ends here."""
        if self._aborted.is_set():
            raise CommunicatorAbortedError(f"rank 0: the epoch was aborted: {self._reason}")
        super().check_tensor(index, tensor)

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        raise AssertionError("the interface answers for a world of one")

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the interface answers for a world of one")

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        raise AssertionError("the interface answers for a world of one")

    def abort(self, reason: str) -> None:
        """Makes every later collective raise."""
        if not self._aborted.is_set():
            self._reason = reason
            self._aborted.set()

    def close(self) -> None:
        """There is nothing to give back."""
