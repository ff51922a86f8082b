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
from tpmodel_worker.weights.group import default_backend

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


def join_indexed_groups(
    *,
    master_address: str,
    master_port: int,
    rank: int,
    size: int,
    device: torch.device,
    address: str,
    backend: str = "",
    timeout_seconds: float,
    deadline_seconds: float,
    cancelled: threading.Event | None = None,
) -> IndexedGroups:
    """Joins both; returns once every member has. All members call it at the same time.

    Args:
        master_address: where the trainer keeps the store.
        master_port: of the store.
        rank: in both groups.
        size: members, all trainers included.
        device: of the data.
        address: IP of this member, to which what it listens on is bound; "": the way to the trainer.
        backend: of the data: nccl or gloo; empty: what the device's kind has.
        timeout_seconds: how long joining may take.
        deadline_seconds: how long a broadcast may wait for a member: signs of life have to come more often.
        cancelled: another thread may set it to end the joining.

    Raises:
        CommunicatorError: a member did not come.
        CommunicatorAbortedError: cancelled was set.
    """
    cancelled = cancelled or threading.Event()
    spec = CommunicatorSpec(
        epoch=0,
        rank=rank,
        world_size=size,
        rendezvous=join_host_port(master_address, master_port),
        rendezvous_id=DATA,
        timeout_seconds=timeout_seconds,
        pods=tuple(str(member) for member in range(size)),
        kind=backend or default_backend(device),
        address=address,
        deadline_seconds=deadline_seconds,
    )
    try:
        spec.check()
        return _join(spec, master_address, master_port, device, cancelled)
    except CommunicatorAbortedError:
        raise
    except (CommunicatorError, DistError, OSError) as error:
        if cancelled.is_set():
            raise CommunicatorAbortedError(f"member {rank}: the joining was cancelled") from error
        raise CommunicatorError(f"member {rank}: {error}") from error


def _join(
    spec: CommunicatorSpec, host: str, port: int, device: torch.device, cancelled: threading.Event
) -> IndexedGroups:
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
            data = _open_data(store, spec, device)
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
