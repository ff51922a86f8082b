"""One control request to every rank, from the fan-out to the last rank's final reply."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import RankFailure, closed_before_reply

ControlName = Literal[
    "init",
    "nccl_sanity_check",
    "load_dense_shard",
    "clear_kv_cache",
    "unload_model",
    "shutdown",
    "weight_update",
    "kv_transfer",
    "weight_copy",
]
ControlRequest = (
    worker_pb2.InitRequest
    | worker_pb2.NcclSanityCheckRequest
    | worker_pb2.LoadDenseShardRequest
    | worker_pb2.ClearKvCacheRequest
    | worker_pb2.UnloadModelRequest
    | worker_pb2.ShutdownRequest
    | worker_pb2.WeightUpdateRequest
    | worker_pb2.KvTransferRequest
    | worker_pb2.WeightCopyRequest
)
ProgressCallback = Callable[[int, worker_pb2.Progress], None]

# The field of the request's oneof, and that of the reply that answers it.
_FIELDS: dict[type[ControlRequest], tuple[ControlName, str]] = {
    worker_pb2.InitRequest: ("init", "init_ok"),
    worker_pb2.NcclSanityCheckRequest: ("nccl_sanity_check", "nccl_sanity_result"),
    worker_pb2.LoadDenseShardRequest: ("load_dense_shard", "load_dense_shard_ok"),
    worker_pb2.ClearKvCacheRequest: ("clear_kv_cache", "kv_cache_cleared"),
    worker_pb2.UnloadModelRequest: ("unload_model", "unloaded"),
    worker_pb2.ShutdownRequest: ("shutdown", "bye"),
    worker_pb2.WeightUpdateRequest: ("weight_update", "weight_update_ok"),
    worker_pb2.KvTransferRequest: ("kv_transfer", "kv_transfer_ok"),
    worker_pb2.WeightCopyRequest: ("weight_copy", "weight_copy_ok"),
}


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the ranks may take over a control request."""

    seconds: float
    progress_counts: bool = False
    """The time starts again with every progress message of any rank."""


def control_name(request: ControlRequest) -> ControlName:
    """The request's name in the protocol."""
    return _FIELDS[type(request)][0]


def wrap(request: ControlRequest, epoch: int, seq: int) -> bytes:
    """The request as it goes over a session."""
    message = worker_pb2.SessionRequest(epoch=epoch, seq=seq)
    getattr(message, control_name(request)).CopyFrom(request)
    # An empty request has to be set too.
    getattr(message, control_name(request)).SetInParent()
    return message.SerializeToString()


class ControlExchange:
    """Collects what the ranks answer to one control request: exactly one final reply or failure each."""

    def __init__(
        self,
        request_type: type[ControlRequest],
        seq: int,
        world_size: int,
        patience: Patience,
        on_progress: ProgressCallback | None,
    ) -> None:
        self.name, self._expected = _FIELDS[request_type]
        self.seq = seq
        self.pending = set(range(world_size))
        self.replies: dict[int, worker_pb2.SessionResponse] = {}
        self.failures: dict[int, RankFailure] = {}
        self._patience = patience
        self._on_progress = on_progress
        self._changed = asyncio.Event()
        self._due = asyncio.get_running_loop().time() + patience.seconds

    def receive(self, rank: int, response: worker_pb2.SessionResponse) -> None:
        """A message of a rank for this request. What follows a final reply is not looked at."""
        if rank not in self.pending:
            return
        which = response.WhichOneof("response")
        if which == "progress":
            if self._patience.progress_counts:
                self._due = max(self._due, asyncio.get_running_loop().time() + self._patience.seconds)
            if self._on_progress is not None:
                self._on_progress(rank, response.progress)
        elif which == "error":
            self.fail(RankFailure(rank, response.error.message, response.error.kind))
        elif which == self._expected:
            self.replies[rank] = response
            self._done(rank)
        else:
            self.fail(RankFailure(rank, f"answered {self.name} with {which or 'an empty message'}"))

    def closed(self, rank: int, detail: str) -> None:
        """A rank's session has ended: its answer will never come."""
        if rank in self.pending:
            self.fail(closed_before_reply(rank, detail))

    def fail(self, failure: RankFailure) -> None:
        """A rank's part is over, without the reply that was due. Its first failure stays."""
        self.failures.setdefault(failure.rank, failure)
        self._done(failure.rank)

    def limit(self, seconds: float) -> None:
        """From now on the ranks have so many seconds, progress or not."""
        self._patience = Patience(seconds)
        self._due = asyncio.get_running_loop().time() + seconds

    async def change(self) -> bool:
        """Waits until a rank has finished its part; False when time is up before that."""
        while not self._changed.is_set():
            left = self._due - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                continue  # a progress message may have moved the time
        self._changed.clear()
        return True

    def _done(self, rank: int) -> None:
        self.pending.discard(rank)
        self._changed.set()
