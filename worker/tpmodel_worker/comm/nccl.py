"""Collectives among GPUs through NCCL: one private process group for each epoch.

A collective returns once it is launched. A peer that dies leaves kernels waiting on the device, and
this rank's computing thread at its next synchronisation: abort, from another thread, releases both.
What the device holds after that is rubbish, so whoever synchronised asks for the epoch's state next.
Never captured in a CUDA graph: as long as a graph with NCCL calls exists, abort does not return.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import cast

import torch
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
    ProcessGroupNCCL,
    Store,
    Work,
)
from torch.distributed import DistError

from tpmodel_worker.comm.communicator import (
    CollectiveArgumentError,
    Communicator,
    CommunicatorAbortedError,
    CommunicatorError,
)
from tpmodel_worker.comm.flight_recorder import keep_off
from tpmodel_worker.comm.interfaces import interface_of
from tpmodel_worker.comm.launches import EpochOverError, Launches
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.specification import CommunicatorSpec
from tpmodel_worker.comm.torch_group import TorchGroup

_SUMMED_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
_WATCH_SECONDS = 0.01


class NcclCommunicator(Communicator):
    """One rank's end of a private NCCL group; no default process group is made."""

    def __init__(self, *, rank: int, world_size: int, epoch: int, device: torch.device, group: TorchGroup) -> None:
        self.name = "nccl"
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._epoch = epoch
        self._group = group
        self._launches = Launches()

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _SUMMED_TYPES:
            expected = ", ".join(str(dtype) for dtype in _SUMMED_TYPES)
            raise CollectiveArgumentError(f"can't sum {tensor.dtype}: expected one of {expected}")
        options = AllreduceOptions()
        # On the current stream: nothing runs beside it that would need an own one.
        options.asyncOp = False
        self._launch("all_reduce", lambda: self._group.allreduce([tensor], options))

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty((self.world_size, *tensor.shape), dtype=tensor.dtype, device=self.device)
        options = AllgatherOptions()
        options.asyncOp = False
        # Flat, since NCCL puts the ranks' parts behind each other, and a scalar has no dimension for that.
        flat, part = gathered.view(-1), tensor.view(-1)
        self._launch("all_gather", lambda: self._group._allgather_base(flat, part, options))
        return gathered

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        options = BroadcastOptions()
        options.rootRank = root
        options.asyncOp = False
        self._launch("broadcast", lambda: self._group.broadcast([tensor], options))

    def abort(self, reason: str) -> None:
        """Ends the epoch: waiting kernels leave the device, later collectives raise. Idempotent."""
        self._launches.end(reason, self._group.abort)

    def close(self) -> None:
        """Waits for the device and gives the group's memory and connections back. Idempotent."""
        if not self._launches.over:
            torch.cuda.synchronize(self.device)
        # All collectives have ended on all ranks before a world is closed. Then abort does what an
        # orderly end would do, without waiting for the peers.
        self._launches.end("it was closed", self._group.abort)

    def _launch(self, operation: str, start: Callable[[], Work | None]) -> None:
        try:
            with self._launches.launch():
                work = start()
            if work is not None:
                # Not launched on the current stream, so that has to wait for it; this thread does not.
                work.wait()
        except EpochOverError as error:
            raise self._aborted(operation, error) from None
        except RuntimeError as error:
            try:
                self._launches.check()
            except EpochOverError as over:
                raise self._aborted(operation, over) from error
            if isinstance(error, DistError):
                raise CommunicatorError(f"rank {self.rank}: {operation} of epoch {self._epoch}: {error}") from error
            raise

    def _aborted(self, operation: str, over: EpochOverError) -> CommunicatorAbortedError:
        return CommunicatorAbortedError(f"rank {self.rank}: {operation} of epoch {self._epoch} was aborted: {over}")


def build_nccl(spec: CommunicatorSpec, *, device: torch.device, meeting: Meeting) -> NcclCommunicator:
    """Makes the group, connects it, and checks one sum.

    Raises:
        CommunicatorError: NCCL failed, a sum was wrong, or the deadline passed.
        CommunicatorAbortedError: the building was cancelled.
    """
    communicator = open_nccl(meeting.store, spec, device=device, connect_seconds=meeting.remaining())
    try:
        _connect(communicator, meeting)
    except CommunicatorError:
        communicator.abort("the world could not be built")
        raise
    return communicator


def open_nccl(
    store: Store, spec: CommunicatorSpec, *, device: torch.device, connect_seconds: float
) -> NcclCommunicator:
    """Makes a group that its first collective will connect, within connect_seconds.

    Raises:
        CommunicatorError: NCCL failed, or the device has no index.
    """
    if device.index is None:
        raise CommunicatorError(f"device {device} has no index: a rank names its device, for example cuda:0")
    _set_environment(connect_seconds, spec.address)
    torch.cuda.set_device(device)
    options = ProcessGroupNCCL.Options()
    options._timeout = timedelta(seconds=spec.deadline_seconds)
    # Non-blocking: a peer that never comes can't keep this rank inside NCCL, where abort would not reach it.
    options.config.blocking = 0
    try:
        group = ProcessGroupNCCL(store, spec.rank, spec.world_size, options)
    except DistError as error:
        raise CommunicatorError(f"no NCCL group on {device}: {error}") from error
    return NcclCommunicator(
        rank=spec.rank, world_size=spec.world_size, epoch=spec.epoch, device=device, group=cast("TorchGroup", group)
    )


def _connect(communicator: NcclCommunicator, meeting: Meeting) -> None:
    """NCCL connects in the first collective, which a second thread ends when it must."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_SECONDS):
            try:
                meeting.remaining()
            except CommunicatorError as error:
                communicator.abort(str(error))
                return

    watcher = threading.Thread(target=watch, name="nccl connect", daemon=True)
    watcher.start()
    try:
        observed = communicator.all_reduce(torch.ones(1, device=communicator.device)).item()
    except CommunicatorAbortedError:
        # Says whether the deadline or an abort was the reason.
        meeting.remaining()
        raise
    finally:
        done.set()
        watcher.join()
    meeting.remaining()
    if observed != communicator.world_size:
        raise CommunicatorError(f"a sum of ones over {communicator.world_size} ranks gave {observed}")


def _set_environment(timeout_seconds: float, address: str) -> None:
    """torch reads these when a group is made: no thread of its own may end the process or dump its state."""
    if address:
        # NCCL's sockets ask nobody for a token, so they listen on the pod's interface only. "=": exactly this name.
        interface = interface_of(address)
        if interface is None:
            raise CommunicatorError(f"{address} is on no network interface here")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    keep_off()
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
    os.environ["TORCH_NCCL_RETHROW_CUDA_ERRORS"] = "0"
    os.environ["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"
    os.environ["TORCH_NCCL_NONBLOCKING_TIMEOUT"] = str(max(int(timeout_seconds), 1))
