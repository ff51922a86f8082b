"""A communicator that has one rank of a larger world compute by itself."""

from __future__ import annotations

import torch

from tpmodel_worker.comm.communicator import Communicator


class WithoutPeers(Communicator):
    """Rank 0 of a world whose other ranks are not there: every one of them is taken to say what this one says.

    What comes of it means nothing; it is for the kernels that run on the way.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self.name = "none"
        self.rank = 0
        self.world_size = world_size
        self.device = device

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        pass

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack([tensor] * self.world_size)

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        pass

    def abort(self, reason: str) -> None:
        """Nobody waits for anybody."""

    def close(self) -> None:
        """There is nothing to give back."""
