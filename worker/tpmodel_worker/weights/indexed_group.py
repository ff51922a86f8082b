"""The two groups of the indexed way, made as torch's own helper for further process groups makes them.

So a trainer that has never heard of this project meets the ranks: a store at its address, a Gloo group for control, a
NCCL or Gloo group for data, one barrier.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistError

from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.comm.communicator import Communicator, CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.comm.gloo import GlooCommunicator, open_gloo, own_address
from tpmodel_worker.comm.sockets import Connections
from tpmodel_worker.comm.specification import CommunicatorSpec
from tpmodel_worker.weights.member import GroupMember

CONTROL = "gloo_group"
DATA = "weight_update_group"
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class IndexedGroups:
    """One member's ends of both groups, and of the store that they were made with."""

    control: GlooCommunicator
    data: Communicator
    store: Connections

    def abort(self, reason: str) -> None:
        """Releases whoever waits in one of them. From any thread; idempotent."""
        self.store.cut()
        self.control.abort(reason)
        self.data.abort(reason)

    def close(self) -> None:
        """Gives everything back. Idempotent."""
        self.control.close()
        self.data.close()


def join_indexed_groups(member: GroupMember, *, cancelled: threading.Event | None = None) -> IndexedGroups:
    """Joins both; returns once every member has. All members call it at the same time.

    Args:
        member: who joins, and where; its rank and size are those of both groups, its device and backend those of
            the data. Signs of life have to come more often than its deadline.
        cancelled: another thread may set it to end the joining.

    Raises:
        CommunicatorError: a member did not come.
        CommunicatorAbortedError: cancelled was set.
    """
    cancelled = cancelled or threading.Event()
    spec = member.spec(DATA)
    try:
        spec.check()
        return _join(spec, member, cancelled)
    except CommunicatorAbortedError:
        raise
    except (CommunicatorError, DistError, OSError) as error:
        if cancelled.is_set():
            raise CommunicatorAbortedError(f"member {member.rank}: the joining was cancelled") from error
        raise CommunicatorError(f"member {member.rank}: {error}") from error


def _join(spec: CommunicatorSpec, member: GroupMember, cancelled: threading.Event) -> IndexedGroups:
    host, port = member.master_address, member.master_port
    deadline = time.monotonic() + spec.timeout_seconds
    _wait_until_listening(host, port, deadline, cancelled)
    connections = Connections(own_address(spec.rendezvous))
    with connections.opening():
        # The trainer's store may wait for as many to connect as there are members.
        store = TCPStore(
            host,
            port,
            world_size=spec.world_size,
            is_master=False,
            timeout=timedelta(seconds=spec.timeout_seconds),
        )
    with contextlib.ExitStack() as undo:
        undo.callback(connections.cut)
        with _cut_when(cancelled, connections):
            control = open_gloo(_group_store(store, CONTROL, "cpu"), spec)
            undo.callback(_discard, control)
            data = _open_data(store, spec, member.device)
            undo.callback(_discard, data)
            control.barrier()
        # A group of NCCL is connected by its first collective, through the store.
        store.set_timeout(timedelta(seconds=spec.deadline_seconds))
        undo.pop_all()
    return IndexedGroups(control, data, connections)


def _open_data(store: Store, spec: CommunicatorSpec, device: torch.device) -> Communicator:
    if spec.resolve_kind(device.type) == "gloo":
        return open_gloo(_group_store(store, DATA, "cpu"), spec, device=device)
    # Only where there are GPUs.
    from tpmodel_worker.comm.nccl import open_nccl

    return open_nccl(_group_store(store, DATA, "cuda"), spec, device=device, connect_seconds=spec.deadline_seconds)


def _group_store(store: Store, group: str, device_type: str) -> Store:
    """The part of the store that torch gives to the backend of a group of this name."""
    return PrefixStore(f"{device_type}/", PrefixStore(f"{group}/", PrefixStore(group, store)))


def _discard(communicator: Communicator) -> None:
    communicator.abort("the groups could not be made")
    communicator.close()


@contextlib.contextmanager
def _cut_when(cancelled: threading.Event, connections: Connections) -> Iterator[None]:
    """torch's waiting for the store cannot be interrupted, but ends with its connection."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_SECONDS):
            if cancelled.is_set():
                connections.cut()
                return

    watcher = threading.Thread(target=watch, name="indexed groups", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _wait_until_listening(host: str, port: int, deadline: float, cancelled: threading.Event) -> None:
    """torch's own attempts to connect can't be interrupted, so they start when they will succeed."""
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.1)).close()
        except OSError as error:
            if time.monotonic() >= deadline:
                raise CommunicatorError(f"no store at {join_host_port(host, port)}: {error}") from error
        else:
            return
        if cancelled.wait(_POLL_SECONDS):
            raise CommunicatorAbortedError("the joining was cancelled")
