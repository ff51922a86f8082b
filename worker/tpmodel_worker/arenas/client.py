"""A rank's link to its supervisor, over which descriptors of arenas and the rank's own news go."""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

from google.protobuf.message import DecodeError

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.errors import ArenaLinkError
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK, ArenaId
from tpmodel_worker.framing import FrameTooLargeError, receive_message, send_message

if TYPE_CHECKING:
    from types import TracebackType

    from tpmodel_worker.arenas.memory import Arena


class ArenaClient:
    """Blocking client of the supervisor's rank socket. Safe to share among threads: one call at a time.

    Every call raises ArenaLinkError when the supervisor refuses, is gone, or does not answer in
    time. After the latter two the link is of no use any more, and says so.
    """

    def __init__(self, path: Path, *, timeout_seconds: float = 30.0) -> None:
        """Connects to the socket at path; timeout_seconds bounds this and every later call."""
        self._timeout = timeout_seconds
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._broken = ""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_seconds)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise ArenaLinkError(f"no supervisor at {path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def hello(self, rank: int, pid: int, port: int) -> str:
        """Says who is on this link and where it listens; returns the registered engine's instance id."""
        request = pod_pb2.RankLinkRequest(hello=pod_pb2.RankHello(rank=rank, pid=pid, port=port))
        return self._call(request).instance_id

    def instance_id(self) -> str:
        """The engine instance that the supervisor is registered with; empty before it is."""
        # The answer to any fetch carries it; the rendezvous process has no arenas.
        nobodys = ArenaId(RENDEZVOUS_RANK, "comm").to_proto()
        request = pod_pb2.RankLinkRequest(fetch_arena=pod_pb2.FetchArenaRequest(arena=nobodys))
        return self._call(request).instance_id

    def store(self, arena: Arena, manifest: worker_pb2.ArenaManifest) -> None:
        """Hands the supervisor a copy of the arena's descriptor; id, bytes and device are filled in here."""
        filled = worker_pb2.ArenaManifest()
        filled.CopyFrom(manifest)
        filled.id.CopyFrom(arena.id.to_proto())
        filled.bytes = arena.size
        filled.device = str(arena.device)
        request = pod_pb2.RankLinkRequest(store_arena=pod_pb2.StoreArenaRequest(manifest=filled))
        self._call(request, descriptor=arena.descriptor)

    def fetch(self, arena_id: ArenaId) -> tuple[int, worker_pb2.ArenaManifest] | None:
        """A descriptor, which the caller then owns, and the manifest; None when there is no such arena."""
        request = pod_pb2.RankLinkRequest(fetch_arena=pod_pb2.FetchArenaRequest(arena=arena_id.to_proto()))
        response, descriptors = self._exchange(request)
        if not response.HasField("manifest"):
            _close_all(descriptors)
            return None
        if len(descriptors) != 1:
            _close_all(descriptors)
            raise ArenaLinkError(f"{arena_id}: the supervisor sent {len(descriptors)} descriptors, expected 1")
        os.set_inheritable(descriptors[0], False)
        return descriptors[0], response.manifest

    def update_manifest(self, manifest: worker_pb2.ArenaManifest) -> None:
        """Replaces the stored manifest of an arena."""
        self._call(pod_pb2.RankLinkRequest(update_manifest=pod_pb2.UpdateManifestRequest(manifest=manifest)))

    def release(self, arena_id: ArenaId) -> None:
        """Makes the supervisor let go of an arena, whose memory is freed once no rank maps it."""
        request = pod_pb2.ReleaseArenaRequest(arena=arena_id.to_proto())
        self._call(pod_pb2.RankLinkRequest(release_arena=request))

    def move(self, arena_id: ArenaId, number: int) -> None:
        """Makes the supervisor hold an arena under another number; it lets go of the one that had it before."""
        request = pod_pb2.MoveArenaRequest(arena=arena_id.to_proto(), to=number)
        self._call(pod_pb2.RankLinkRequest(move_arena=request))

    def abort_started(self, epoch: int, deadline_seconds: float) -> None:
        """The rank leaves an epoch: unless abort_done follows within deadline_seconds it is to be killed."""
        request = pod_pb2.AbortStarted(epoch=epoch, deadline_seconds=deadline_seconds)
        self._call(pod_pb2.RankLinkRequest(abort_started=request))

    def abort_done(self, epoch: int) -> None:
        """The rank has left the epoch."""
        self._call(pod_pb2.RankLinkRequest(abort_done=pod_pb2.AbortDone(epoch=epoch)))

    def await_promotion(self, device_bytes: int) -> int | None:
        """A spare says that it is ready and waits for the rank that it is to become; None: the supervisor is gone.

        device_bytes: device memory that its contexts hold.
        """
        request = pod_pb2.RankLinkRequest(await_promotion=pod_pb2.AwaitPromotionRequest(device_bytes=device_bytes))
        self._socket.settimeout(None)
        try:
            response = self._call(request)
        except ArenaLinkError:
            return None
        finally:
            self._socket.settimeout(self._timeout)
        return response.promoted_to

    def wait_until_closed(self) -> None:
        """Returns when the supervisor has closed the link or is gone; for processes that live as long as it."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()

    def close(self) -> None:
        """Closes the link. Idempotent."""
        self._broken = self._broken or "it was closed"
        self._socket.close()

    def _call(self, request: pod_pb2.RankLinkRequest, descriptor: int | None = None) -> pod_pb2.RankLinkResponse:
        response, descriptors = self._exchange(request, descriptor)
        _close_all(descriptors)
        return response

    def _exchange(
        self, request: pod_pb2.RankLinkRequest, descriptor: int | None = None
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]]:
        what = request.WhichOneof("request")
        if not self._lock.acquire(timeout=self._timeout):
            raise ArenaLinkError(f"{what}: the link to the supervisor was busy for {self._timeout} s")
        try:
            if self._broken:
                raise ArenaLinkError(f"{what}: the link to the supervisor is of no use any more: {self._broken}")
            request.id = next(self._ids)
            response, descriptors = self._round_trip(request, [] if descriptor is None else [descriptor])
        except (OSError, DecodeError, FrameTooLargeError) as error:
            # An answer that comes later would be taken for the next request's.
            self._broken = f"{what}: {error or type(error).__name__}"
            self._socket.close()
            raise ArenaLinkError(f"{what}: the supervisor did not answer: {error}") from error
        finally:
            self._lock.release()
        if response.error:
            _close_all(descriptors)
            raise ArenaLinkError(f"{what}: the supervisor refused: {response.error}")
        return response, descriptors

    def _round_trip(
        self, request: pod_pb2.RankLinkRequest, descriptors: list[int]
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]]:
        send_message(self._socket, request, descriptors)
        received = receive_message(self._socket, pod_pb2.RankLinkResponse)
        if received is None:
            raise ConnectionResetError("the supervisor closed the connection")
        response, received_descriptors = received
        if response.id != request.id:
            _close_all(received_descriptors)
            raise ConnectionAbortedError(f"answer to request {response.id} in the place of {request.id}")
        return response, received_descriptors


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
