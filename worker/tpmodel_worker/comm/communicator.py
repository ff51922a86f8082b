"""The one interface through which ranks exchange tensors. Made for an epoch, passed explicitly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch


class CommunicatorError(Exception):
    """The communicator could not be built, or a peer failed."""


class CommunicatorAbortedError(CommunicatorError):
    """The epoch was aborted while, or before, a collective ran."""


class CollectiveArgumentError(ValueError):
    """A collective was called with arguments that cannot work; nothing was sent."""


class Communicator(ABC):
    """Collectives over the ranks of one world.

    All but abort are called from the rank's computing thread, by all ranks in the same order.
    Results are bitwise equal on all ranks.
    """

    name: str
    """shared_memory, gloo, nccl or single."""
    rank: int
    world_size: int
    device: torch.device
    abort_seconds: float = 5.0
    """How long leaving an aborted epoch may take before the process is given up."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a contiguous floating-point tensor over all ranks, in place; returns it.

        Raises:
            CollectiveArgumentError: wrong device, dtype or layout.
            CommunicatorAbortedError: abort was called.
            CommunicatorError: a peer failed or the deadline passed.
        """
        self.check_tensor(0, tensor)
        if self.world_size > 1:
            self._all_reduce(tensor)
        return tensor

    def all_gather(self, tensor: torch.Tensor, outputs: Sequence[torch.Tensor] | None = None) -> torch.Tensor:
        """Every rank's tensor of one shape and dtype, stacked: (world_size, *tensor.shape).

        With outputs (one per rank, shaped like tensor) they are filled as well.
        Raises as all_reduce.
        """
        self.check_tensor(0, tensor)
        if outputs is not None:
            self.check_count(outputs)
            for index, output in enumerate(outputs):
                self.check_tensor(index, output)
        gathered = tensor.unsqueeze(0).clone() if self.world_size == 1 else self._all_gather(tensor)
        if outputs is not None:
            for output, part in zip(outputs, gathered, strict=True):
                output.copy_(part)
        return gathered

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Overwrites the tensor by the root rank's, in place; returns it. Raises as all_reduce."""
        self.check_tensor(0, tensor)
        if not 0 <= root < self.world_size:
            raise CollectiveArgumentError(f"root {root} is not a rank: expected 0 to {self.world_size - 1}")
        if self.world_size > 1:
            self._broadcast(tensor, root)
        return tensor

    def barrier(self) -> None:
        """Returns once every rank has called it."""
        self.all_reduce(torch.ones(1, device=self.device))

    def check_count(self, tensors: Sequence[torch.Tensor]) -> None:
        """Raises unless there is one tensor for each rank."""
        if len(tensors) != self.world_size:
            raise CollectiveArgumentError(f"expected {self.world_size} tensors, got {len(tensors)}")

    def check_tensor(self, index: int, tensor: torch.Tensor) -> None:
        """Raises unless the tensor lies, contiguous, on this communicator's device."""
        if tensor.device != self.device:
            raise CollectiveArgumentError(f"tensor {index} is on {tensor.device}, expected {self.device}")
        if not tensor.is_contiguous():
            raise CollectiveArgumentError(f"tensor {index} is not contiguous: call .contiguous() first")

    @abstractmethod
    def _all_reduce(self, tensor: torch.Tensor) -> None: ...

    @abstractmethod
    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def _broadcast(self, tensor: torch.Tensor, root: int) -> None: ...

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Releases the computing thread from any collective, now and later. From another thread; idempotent."""

    @abstractmethod
    def close(self) -> None:
        """Gives back everything that the epoch held. Idempotent."""
