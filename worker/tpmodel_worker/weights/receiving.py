"""How the tensors of an update come: in the order that was announced, or each behind its index."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tpmodel.v1 import weights_pb2
from tpmodel_worker.weights.broadcast import Broadcaster, Progress
from tpmodel_worker.weights.indexed import RETRY_SECONDS, IndexedReceiver
from tpmodel_worker.weights.membership import Membership
from tpmodel_worker.weights.packing import TensorInfo

Load = Callable[[str, torch.Tensor], None]
Receiving = Callable[[Load, Progress], None]
"""Hands every tensor to the first argument, and to the second how many bytes have come."""


class _Awaited:
    """A receiver that has the first index of a set, and what it was made for."""

    def __init__(self, tensors: weights_pb2.UpdateRequest, receiver: IndexedReceiver) -> None:
        self.tensors = tensors
        self.receiver = receiver


class Receivers:
    """Makes what receives, for one member of the trainer's group. Used by the computing thread."""

    def __init__(self, member: Membership) -> None:
        self._member = member
        self._awaited: _Awaited | None = None

    def forget(self) -> None:
        """Another group is joined: no index of it has come."""
        self._awaited = None

    def awaiting(self, tensors: Sequence[TensorInfo], request: weights_pb2.UpdateRequest) -> IndexedReceiver:
        """One that waits for the first index of a set; the receiving of that set goes on with it."""
        receiver = self._indexed(tensors)
        self._awaited = _Awaited(request, receiver)
        return receiver

    def receiving(self, tensors: Sequence[TensorInfo], request: weights_pb2.UpdateRequest) -> tuple[int, Receiving]:
        """The bytes that will come, and what receives them."""
        if request.indexed:
            awaited, self._awaited = self._awaited, None
            known = awaited is not None and _same(awaited.tensors, request)
            receiver = awaited.receiver if awaited is not None and known else self._indexed(tensors)
            return sum(tensor.bytes for tensor in tensors), receiver.receive
        broadcaster = Broadcaster(
            self._member.group_for("receive"),
            tensors,
            buffer_size=request.buffer_size if request.packed else 0,
            buffer_count=request.buffer_count if request.packed else 1,
        )
        deadline = self._member.deadline_seconds
        return broadcaster.total_bytes, lambda load, progress: broadcaster.receive(load, progress, deadline)

    def _indexed(self, tensors: Sequence[TensorInfo]) -> IndexedReceiver:
        member = self._member
        group = member.group_for("receive")
        return IndexedReceiver(group, tensors, cancelled=member.cancelled, retry_seconds=RETRY_SECONDS)


def _same(awaited: weights_pb2.UpdateRequest, request: weights_pb2.UpdateRequest) -> bool:
    return awaited.names == request.names and awaited.dtypes == request.dtypes
