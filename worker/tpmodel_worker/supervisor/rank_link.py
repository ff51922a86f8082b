"""The Unix socket on which ranks (and the rendezvous process) report, leave their memory and confirm aborts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.message import DecodeError

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.identity import SPARE_RANK
from tpmodel_worker.framing import FrameTooLargeError
from tpmodel_worker.supervisor.channel import DescriptorChannel
from tpmodel_worker.supervisor.memory import ArenaError, MemoryHolder, read_id
from tpmodel_worker.supervisor.processes import Process

_log = logging.getLogger(__name__)

# A rank may connect before the supervisor has read the fork server's answer.
_KNOWN_SECONDS = 5.0
_SEND_SECONDS = 10.0
_BACKLOG = 128
_ASKS_INSTANCE = ("hello", "fetch_arena")

SpareListener = Callable[[Process, int], None]
"""Called with a spare that could be promoted, and the device memory that it holds."""
HelloListener = Callable[[int, Process, int], None]
"""Called with the rank, its process and the port it serves on."""


@dataclass(slots=True)
class _Peer:
    rank: int
    process: Process
    deadmen: dict[int, asyncio.TimerHandle] = field(default_factory=dict)
    promotion: asyncio.Future[int | None] | None = None
    """A spare's: the rank that it is to become; None: it has ended."""


class RankLinkServer:
    """Serves pod.proto's RankLink messages to the processes that this supervisor forked, and to no others."""

    def __init__(
        self,
        path: Path,
        memory: MemoryHolder,
        *,
        instance_id: Callable[[], Awaitable[str]],
        on_hello: HelloListener,
        on_spare: SpareListener = lambda _process, _bytes: None,
    ) -> None:
        """instance_id: the engine instance that the supervisor is registered with now, "" before."""
        self._path = path
        self._memory = memory
        self._instance_id = instance_id
        self._on_hello = on_hello
        self._on_spare = on_spare
        self._peers: dict[int, _Peer] = {}
        self._changed = asyncio.Condition()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listens. Raises OSError when the socket cannot be made."""
        self._listener.setblocking(False)
        self._listener.bind(str(self._path))
        self._listener.listen(_BACKLOG)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)

    async def stop(self) -> None:
        """Closes the socket and every connection."""
        asyncio.get_running_loop().remove_reader(self._listener.fileno())
        self._listener.close()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # it left before it was accepted
        task = asyncio.create_task(self._serve_connection(DescriptorChannel(connection)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def expect(self, rank: int, process: Process) -> None:
        """Lets a process that was forked for a rank speak for it, until it ends."""
        peer = _Peer(rank, process)
        if rank == SPARE_RANK:
            peer.promotion = asyncio.get_running_loop().create_future()
        async with self._changed:
            self._peers[process.pid] = peer
            self._changed.notify_all()
        process.exited.add_done_callback(lambda _: self._forget(process.pid))

    async def promote(self, process: Process, rank: int) -> None:
        """Tells a spare which rank it is from now on; it says hello over a connection of its own."""
        spare = self._peers.get(process.pid)
        if spare is None or spare.promotion is None:
            return  # it has ended meanwhile, which whoever waits for its hello sees
        await self.expect(rank, process)
        if not spare.promotion.done():
            spare.promotion.set_result(rank)

    def _forget(self, pid: int) -> None:
        peer = self._peers.pop(pid, None)
        if peer is not None:
            for timer in peer.deadmen.values():
                timer.cancel()
            if peer.promotion is not None and not peer.promotion.done():
                peer.promotion.set_result(None)

    async def _peer(self, pid: int) -> _Peer | None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_KNOWN_SECONDS), self._changed:
                await self._changed.wait_for(lambda: pid in self._peers)
        return self._peers.get(pid)

    async def _serve_connection(self, channel: DescriptorChannel) -> None:
        with channel:
            pid = channel.peer_pid
            peer = await self._peer(pid)
            if peer is None:
                _log.warning("process %d connected to the rank socket, but was not started from here: refused", pid)
                return
            try:
                if peer.promotion is not None:
                    await self._serve_spare(channel, peer, peer.promotion)
                    return
                while (received := await channel.receive(pod_pb2.RankLinkRequest)) is not None:
                    response, descriptor = self._answer(peer, *received)
                    if received[0].WhichOneof("request") in _ASKS_INSTANCE:
                        response.instance_id = await self._instance_id()
                    async with asyncio.timeout(_SEND_SECONDS):
                        await channel.send(response, [] if descriptor is None else [descriptor])
            except (ConnectionError, TimeoutError, FrameTooLargeError, DecodeError) as error:
                _log.warning("connection of %s: %s", peer.process.name, error or type(error).__name__)

    async def _serve_spare(
        self, channel: DescriptorChannel, peer: _Peer, promotion: asyncio.Future[int | None]
    ) -> None:
        """Answers a spare's one request, as late as it is promoted."""
        received = await channel.receive(pod_pb2.RankLinkRequest)
        if received is None:
            return
        request, descriptors = received
        for unused in descriptors:
            os.close(unused)
        response = pod_pb2.RankLinkResponse(id=request.id)
        if request.WhichOneof("request") == "await_promotion" and not descriptors:
            self._on_spare(peer.process, request.await_promotion.device_bytes)
            rank = await promotion
            if rank is None:
                return
            response.promoted_to = rank
        else:
            response.error = "a spare may only wait for its promotion"
        async with asyncio.timeout(_SEND_SECONDS):
            await channel.send(response)

    def _answer(
        self, peer: _Peer, request: pod_pb2.RankLinkRequest, descriptors: list[int]
    ) -> tuple[pod_pb2.RankLinkResponse, int | None]:
        response = pod_pb2.RankLinkResponse(id=request.id)
        wanted = 1 if request.WhichOneof("request") == "store_arena" else 0
        descriptor = None
        try:
            if len(descriptors) != wanted:
                raise ArenaError(f"{len(descriptors)} descriptors came with the request, expected {wanted}")
            descriptor = self._execute(peer, request, response, descriptors)
        except ArenaError as error:
            response.error = str(error)
        finally:
            for unused in descriptors:
                os.close(unused)
        return response, descriptor

    def _execute(
        self,
        peer: _Peer,
        request: pod_pb2.RankLinkRequest,
        response: pod_pb2.RankLinkResponse,
        descriptors: list[int],
    ) -> int | None:
        """Does what is asked; takes the descriptors it keeps out of the list; returns the one to send back."""
        match request.WhichOneof("request"):
            case "hello":
                self._hello(peer, request.hello)
            case "store_arena":
                _check_owner(peer, request.store_arena.manifest.id)
                self._memory.store(request.store_arena.manifest, descriptors.pop())
            case "fetch_arena":
                found = self._memory.fetch(request.fetch_arena.arena)
                if found is not None:
                    response.manifest.CopyFrom(found[0])
                    return found[1]
            case "update_manifest":
                _check_owner(peer, request.update_manifest.manifest.id)
                self._memory.update(request.update_manifest.manifest)
            case "move_arena":
                _check_owner(peer, request.move_arena.arena)
                self._memory.move(request.move_arena.arena, request.move_arena.to)
            case "release_arena":
                _check_owner(peer, request.release_arena.arena)
                self._memory.release(request.release_arena.arena)
            case "abort_started":
                self._arm(peer, request.abort_started)
            case "abort_done":
                self._disarm(peer, request.abort_done.epoch)
            case _:
                raise ArenaError("unknown request")
        return None

    def _hello(self, peer: _Peer, hello: pod_pb2.RankHello) -> None:
        if (hello.rank, hello.pid) != (peer.rank, peer.process.pid):
            raise ArenaError(
                f"hello of rank {hello.rank}, pid {hello.pid}, from the process that was forked as rank {peer.rank}, "
                f"pid {peer.process.pid}"
            )
        self._on_hello(peer.rank, peer.process, hello.port)

    def _arm(self, peer: _Peer, started: pod_pb2.AbortStarted) -> None:
        self._disarm(peer, started.epoch)
        loop = asyncio.get_running_loop()
        peer.deadmen[started.epoch] = loop.call_later(
            started.deadline_seconds, self._kill, peer, started.epoch, started.deadline_seconds
        )

    def _disarm(self, peer: _Peer, epoch: int) -> None:
        for armed in [armed for armed in peer.deadmen if armed <= epoch]:
            peer.deadmen.pop(armed).cancel()

    def _kill(self, peer: _Peer, epoch: int, seconds: float) -> None:
        _log.error("%s has not left epoch %d within %.1f s: killing it", peer.process.name, epoch, seconds)
        peer.process.send_signal(signal.SIGKILL)


def _check_owner(peer: _Peer, arena: worker_pb2.ArenaId) -> None:
    if arena.rank != peer.rank:
        raise ArenaError(f"{read_id(arena)} is not rank {peer.rank}'s to change")
