"""What happens for the first time in a broadcast of weights happens when the group is joined, before the pause.

NCCL connects its members' buffers at the first large message, torch takes the device's memory at the first allocation
and keeps it, and CUDA loads a kernel at its first launch.
"""

from __future__ import annotations

import torch

from tpmodel.v1 import weights_pb2
from tpmodel_worker.weights.broadcast import Broadcaster, Group
from tpmodel_worker.weights.member import Rehearsal
from tpmodel_worker.weights.packing import DTYPES, MAX_BUFFERS, TensorInfo

_COLUMNS = 1024
_ROWS_CUT = 64
"""A rank cuts as much out of every buffer: what is rehearsed there are kernels, not bytes."""


def read_rehearsal(message: weights_pb2.UpdateRehearsal) -> Rehearsal:
    """Raises ValueError where it can't be."""
    if message.buffer_bytes < 1 or not 1 <= message.buffer_count <= MAX_BUFFERS:
        raise ValueError(
            f"rehearsal with {message.buffer_count} buffers of {message.buffer_bytes} bytes: 1 to {MAX_BUFFERS} of at "
            "least 1 byte"
        )
    if message.dtype not in DTYPES:
        raise ValueError(f"rehearsal with dtype {message.dtype!r}: expected one of {', '.join(DTYPES)}")
    return Rehearsal(message.buffer_bytes, message.buffer_count, message.dtype)


def rehearse(group: Group, rehearsal: Rehearsal, *, sends: bool, deadline_seconds: float) -> None:
    """Broadcasts zeros in buffers as an update will use them; the memory stays with torch. All members call it.

    sends: this member is the trainer. Raises as Broadcaster.send.
    """
    dtype = DTYPES[rehearsal.dtype]
    elements = max(rehearsal.buffer_bytes // dtype.itemsize, 1)
    columns = min(elements, _COLUMNS)
    shape = (elements // columns, columns)
    tensors = [TensorInfo(f"buffer {number}", rehearsal.dtype, shape) for number in range(rehearsal.buffer_count)]
    broadcaster = Broadcaster(group, tensors, buffer_size=0, buffer_count=rehearsal.buffer_count)
    if sends:
        zeros = torch.zeros((), dtype=dtype, device=group.device).expand(shape)
        broadcaster.send(lambda _name: zeros, lambda _done: None, deadline_seconds)
        return
    cut = torch.empty((min(shape[0], _ROWS_CUT), -(-columns // 2)), dtype=dtype, device=group.device)

    def load(_name: str, tensor: torch.Tensor) -> None:
        cut.copy_(tensor[: cut.shape[0], : cut.shape[1]])

    broadcaster.receive(load, lambda _done: None, deadline_seconds)
