"""Collectives through Gloo over TCP: among CPU ranks of different pods, and among ranks that share a GPU.

Tensors on a GPU go through host memory, which is slow. NCCL refuses two ranks on one GPU.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
from torch._C._distributed_c10d import BroadcastOptions, ProcessGroupGloo, Store, Work

from tpmodel_worker.comm.communicator import (
    CollectiveArgumentError,
    Communicator,
    CommunicatorAbortedError,
    CommunicatorError,
)
from tpmodel_worker.comm.flight_recorder import RECORDING, keep_off
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.sockets import Connections
from tpmodel_worker.comm.specification import CommunicatorSpec
from tpmodel_worker.comm.torch_group import TorchGroup

_HALF_TYPES = (torch.float16, torch.bfloat16)
_SUMMED_TYPES = (torch.float32, torch.float64, torch.int64, *_HALF_TYPES)
_POLL_SECONDS = 0.01
_CPU = torch.device("cpu")


class GlooCommunicator(Communicator):
    """One rank's end of a private Gloo group; no default process group is made."""

    abort_seconds = 1.0

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        epoch: int,
        device: torch.device,
        group: TorchGroup,
        connections: Connections,
        deadline_seconds: float,
    ) -> None:
        """device: where the tensors lie. connections: the group's, to be cut when the epoch is aborted."""
        self.name = "gloo"
        self._connections = connections
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._epoch = epoch
        self._deadline_seconds = deadline_seconds
        self._group: TorchGroup | None = group
        self._aborted = threading.Event()
        self._reason = ""
        self._unfinished: Work | None = None
        # Gloo's thread lets go of a collective a moment after its end. Were its reference the last one, it would want
        # the interpreter's lock for the tensors, which a thread may hold that takes the group apart and waits for it.
        self._last: Work | None = None

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if tensor.dtype not in _SUMMED_TYPES:
            expected = ", ".join(str(dtype) for dtype in _SUMMED_TYPES)
            raise CollectiveArgumentError(f"can't sum {tensor.dtype}: expected one of {expected}")
        group = self._enter("all_reduce")
        # Gloo rounds half types after every addition; everywhere else they are rounded once.
        summed = (tensor.float() if tensor.dtype in _HALF_TYPES else tensor).cpu()
        self._run("all_reduce", lambda: group.allreduce([summed]))
        if summed is not tensor:
            tensor.copy_(summed)

    def _all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        group = self._enter("all_gather")
        gathered = torch.empty((self.world_size, *tensor.shape), dtype=tensor.dtype)
        own = tensor.cpu()
        self._run("all_gather", lambda: group.allgather([list(gathered.unbind(0))], [own]))
        return gathered.to(self.device)

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        group = self._enter("broadcast")
        options = BroadcastOptions()
        options.rootRank = root
        staged = tensor.cpu()
        self._run("broadcast", lambda: group.broadcast([staged], options))
        if staged is not tensor and self.rank != root:
            tensor.copy_(staged)

    def barrier(self) -> None:
        """Returns once every rank has called it. Gloo's own, so that members outside this project can."""
        group = self._enter("barrier")
        self._run("barrier", group.barrier)

    def abort(self, reason: str) -> None:
        """Cuts the connections: what Gloo has in flight fails, which releases the computing thread. Idempotent."""
        self._reason = self._reason or reason
        self._aborted.set()
        self._connections.cut()

    def close(self) -> None:
        """Closes the connections, once the collective in flight has ended. Idempotent.

        That takes no time on connections that were cut; where it does, the deadman ends the process.
        """
        self._connections.cut()
        work, self._unfinished = self._unfinished, None
        # A group that is taken apart waits for its collectives, and holds the interpreter's lock meanwhile.
        while work is not None and not work.is_completed():
            time.sleep(_POLL_SECONDS)
        self._group = None
        self._last = None

    def _enter(self, operation: str) -> TorchGroup:
        self._check_aborted(operation)
        if self._group is None:
            raise CommunicatorError(f"rank {self.rank}: the communicator of epoch {self._epoch} is closed")
        if self._unfinished is not None:
            raise CommunicatorError(f"rank {self.rank}: a collective of epoch {self._epoch} has failed before")
        return self._group

    def _run(self, operation: str, begin: Callable[[], Work | None]) -> None:
        with RECORDING:
            work = begin()
        assert work is not None, "Gloo always gives the work back"
        self._unfinished = work
        # abort may have cut the connections before the collective began.
        self._check_aborted(operation)
        where = f"rank {self.rank}: {operation} of epoch {self._epoch}"
        try:
            # Not by a callback: it would run the interpreter, and its collector of garbage, in Gloo's thread.
            work.wait(timedelta(seconds=self._deadline_seconds))
        except RuntimeError as error:
            self._check_aborted(operation)
            if not work.is_completed():
                raise CommunicatorError(f"{where} did not end within {self._deadline_seconds} s") from error
            raise CommunicatorError(f"{where}: {error}") from error
        self._check_aborted(operation)
        self._unfinished, self._last = None, work

    def _check_aborted(self, operation: str) -> None:
        if self._aborted.is_set():
            raise CommunicatorAbortedError(
                f"rank {self.rank}: {operation} of epoch {self._epoch} was aborted: {self._reason}"
            )


def build_gloo(spec: CommunicatorSpec, *, meeting: Meeting, device: torch.device = _CPU) -> GlooCommunicator:
    """Connects to all ranks of an epoch. Raises as open_gloo."""
    return open_gloo(meeting.store, spec, device=device, meeting=meeting)


def open_gloo(
    store: Store, spec: CommunicatorSpec, *, device: torch.device = _CPU, meeting: Meeting | None = None
) -> GlooCommunicator:
    """Connects to all ranks, and listens on the pod's own address only: Gloo asks nobody for a token.

    Args:
        store: through which the ranks find each other.
        spec: of the group.
        device: where the tensors will lie.
        meeting: of ranks that are all ours: they tell each other where they listen, so that an abort cuts the group's
            connections and no others. None: it cuts whatever is opened at the same time.

    Raises:
        CommunicatorError: a rank could not be connected to.
    """
    keep_off()
    address = spec.address or own_address(spec.rendezvous)
    # Not in torch's stubs; without devices of its own Gloo listens where the host's name leads.
    options: Any = cast("Any", ProcessGroupGloo)._Options()
    connections = Connections(address)
    try:
        options._devices = [connections.listen(lambda: ProcessGroupGloo.create_device(hostname=address))]
    except (OSError, RuntimeError) as error:
        raise CommunicatorError(f"Gloo can't listen on {address}: {error}") from error
    options._threads = 1
    options._timeout = timedelta(seconds=spec.deadline_seconds)
    try:
        with connections.opening(_peer_ports(meeting, spec, connections) if meeting is not None else None):
            group = ProcessGroupGloo(store, spec.rank, spec.world_size, options)
    except RuntimeError as error:
        raise CommunicatorError(f"no Gloo group on {address}: {error}") from error
    return GlooCommunicator(
        rank=spec.rank,
        world_size=spec.world_size,
        epoch=spec.epoch,
        device=device,
        group=cast("TorchGroup", group),
        connections=connections,
        deadline_seconds=spec.deadline_seconds,
    )


def _peer_ports(meeting: Meeting, spec: CommunicatorSpec, connections: Connections) -> set[int]:
    """Where all ranks listen for each other."""
    meeting.store.set(f"gloo ports/{spec.rank}", " ".join(str(port) for port in connections.ports))
    meeting.wait_for_all("listening for Gloo")
    published = [meeting.store.get(f"gloo ports/{rank}").decode() for rank in range(spec.world_size)]
    return {int(port) for ports in published for port in ports.split()}


def own_address(rendezvous: str) -> str:
    """The address of this machine from which the rendezvous is reached; nothing is sent."""
    host, _, port = rendezvous.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host.removeprefix("[").removesuffix("]"), int(port)))
        return probe.getsockname()[0]
