"""The collectives that torch's Gloo and NCCL backends have, and its type stubs leave out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllreduceOptions, BroadcastOptions, Work


class TorchGroup(Protocol):
    """A backend of torch.distributed, used without its process groups.

    Work is None where the collective is launched on the current stream already.
    """

    def allreduce(self, tensors: list[Tensor], opts: AllreduceOptions = ..., /) -> Work | None:
        """Sums the one tensor in the list over all ranks, in place."""
        ...

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: AllgatherOptions = ..., /) -> Work:
        """Fills the one list of outputs with every rank's one input."""
        ...

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: AllgatherOptions = ..., /) -> Work | None: ...

    def broadcast(self, tensors: list[Tensor], opts: BroadcastOptions = ..., /) -> Work | None:
        """Overwrites the one tensor in the list by the root's."""
        ...

    def barrier(self) -> Work | None:
        """Returns, or is done, once every rank has called it."""
        ...

    def abort(self) -> None:
        """Ends what is in flight, where the backend can."""
        ...
