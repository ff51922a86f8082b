"""How the members of a pipe find each other, and the connections of one direction that come of it.

Each direction has two members and two connections of its own: headers and replies go over TCP, tensors
through a private group of two (Gloo or NCCL), in which the sender is rank 0. Two directions that shared a
group would wait for each other where both send first.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.proof import prove_membership
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.comm.specification import CommunicatorSpec
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.control import ControlConnection, ControlListener, connect
from tpmodel_worker.kv.errors import KvPipeError

SENDER, RECEIVER = 0, 1


@dataclass(frozen=True, slots=True)
class Link:
    """One direction's connections, at one end."""

    control: ControlConnection
    data: Communicator

    def abort(self, reason: str) -> None:
        """Releases every thread that waits on it, here and, since the connection ends, there. Idempotent."""
        self.control.shut_down()
        self.data.abort(reason)

    def close(self) -> None:
        """Gives everything back, once no thread uses it. Idempotent."""
        self.control.close()
        self.data.close()


@dataclass(frozen=True, slots=True)
class Links:
    """Both directions of a member, and on member 0 the store."""

    outgoing: Link
    incoming: Link
    store: TCPStore | None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as (bytes,) uint8: every group can move that, whatever the dtype."""
    return tensor.view(-1).view(torch.uint8)


def connect_links(config: KvPipeConfig, store: TCPStore | None, cancelled: threading.Event) -> Links:
    """Meets the other members and connects; returns once every member has. All call it at the same time.

    store: of member 0; None: it is started here. cancelled: another thread may set it to end the connecting.

    Raises:
        KvPipeError: somebody did not come within the store's timeout, or has another token; nothing is left open.
    """
    try:
        if config.rank == 0 and store is None:
            store = start_store(config.master_address, config.port)
        meeting = Meeting(_ring_spec(config), cancelled)
        return _Connecting(config, meeting, store, cancelled).run()
    except (CommunicatorError, KvPipeError, OSError) as error:
        raise KvPipeError(f"member {config.rank} of the pipe: {error}") from error


class _Connecting:
    def __init__(
        self, config: KvPipeConfig, meeting: Meeting, store: TCPStore | None, cancelled: threading.Event
    ) -> None:
        self._config = config
        self._cancelled = cancelled
        self._meeting = meeting
        self._store = store
        self._undo: list[Callable[[], None]] = []

    def run(self) -> Links:
        try:
            links = self._run()
        except (CommunicatorError, KvPipeError, OSError) as error:
            self._meeting.report_failure(error)
            for undo in reversed(self._undo):
                undo()
            raise
        return links

    def _run(self) -> Links:
        rank, world_size = self._config.rank, self._config.world_size
        target, source = (rank + 1) % world_size, (rank - 1) % world_size
        outgoing, incoming = self._control_connections(target, source)
        # All members build the groups in the order of their senders: no ring of members that wait for each other.
        groups = {sender: self._group(sender) for sender in sorted({rank, source})}
        links = Links(Link(outgoing, groups[rank]), Link(incoming, groups[source]), self._store)
        self._meeting.wait_for_all("connected")
        return links

    def _control_connections(self, target: int, source: int) -> tuple[ControlConnection, ControlConnection]:
        config, meeting = self._config, self._meeting
        listener = ControlListener(config.address)
        try:
            meeting.store.set(f"listener/{config.rank}", join_host_port(config.address, listener.port))
            meeting.wait_for_all("listening")
            host, _, port = meeting.store.get(f"listener/{target}").decode().rpartition(":")
            with ThreadPoolExecutor(1) as threads:
                accepted = threads.submit(listener.accept, config.token, _purpose(config, source), meeting.remaining)
                try:
                    outgoing = connect(
                        host.removeprefix("[").removesuffix("]"),
                        int(port),
                        own_address=config.address,
                        token=config.token,
                        purpose=_purpose(config, config.rank),
                        seconds=meeting.remaining(),
                    )
                except (CommunicatorError, KvPipeError):
                    listener.close()
                    raise
                self._undo.append(outgoing.close)
                incoming = accepted.result()
                self._undo.append(incoming.close)
        finally:
            listener.close()
        return outgoing, incoming

    def _group(self, sender: int) -> Communicator:
        """The tensors' group of one direction; both members have proved to know the token over it."""
        config = self._config
        spec = dataclasses.replace(
            _ring_spec(config),
            rank=SENDER if sender == config.rank else RECEIVER,
            world_size=2,
            rendezvous_id=f"from {sender}",
            timeout_seconds=self._meeting.remaining(),
            pods=("sender", "receiver"),
            address=config.address,
        )
        device = config.resolve_device()
        meeting = Meeting(spec, self._cancelled)
        # Each imports only what its own device needs.
        if device.type == "cuda":
            from tpmodel_worker.comm.nccl import build_nccl

            group: Communicator = build_nccl(spec, device=device, meeting=meeting)
        else:
            from tpmodel_worker.comm.gloo import build_gloo

            group = build_gloo(spec, meeting=meeting)
        self._undo += [group.close, lambda: group.abort("the pipe could not be made")]
        prove_membership(group, config.token, _purpose(config, sender))
        return group


def _ring_spec(config: KvPipeConfig) -> CommunicatorSpec:
    return CommunicatorSpec(
        epoch=0,
        rank=config.rank,
        world_size=config.world_size,
        rendezvous=join_host_port(config.master_address, config.port),
        rendezvous_id="ring",
        timeout_seconds=config.store_timeout_seconds,
        pods=tuple(str(rank) for rank in range(config.world_size)),
        deadline_seconds=config.deadline_seconds,
    )


def _purpose(config: KvPipeConfig, sender: int) -> str:
    return f"port {config.port}, from {sender} of {config.world_size}"
