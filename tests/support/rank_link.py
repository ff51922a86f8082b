"""A supervisor's rank socket without a supervisor: holds arenas in memory, in threads of the test's process."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.framing import receive_message, send_message


@contextlib.contextmanager
def open_rank_link() -> Iterator[RankLink]:
    """One at a path of its own: a socket's has to be short."""
    with tempfile.TemporaryDirectory(prefix="tp") as folder, RankLink(Path(folder) / "s") as link:
        yield link


class RankLink:
    """Answers every request of the rank link and notes what was asked; a context manager."""

    def __init__(self, path: Path, *, instance_id: str = "engine-1") -> None:
        self.path = path
        self.instance_id = instance_id
        self.arenas: dict[ArenaId, tuple[int, worker_pb2.ArenaManifest]] = {}
        self.requests: list[pod_pb2.RankLinkRequest] = []
        self.silent = False
        """Set, nothing is answered any more."""
        self._ports: dict[int, int] = {}
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every connection, as the death of a supervisor would, and releases all memory."""
        self.disconnect()
        # Closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._changed:
            for descriptor, _manifest in self.arenas.values():
                os.close(descriptor)
            self.arenas.clear()

    def disconnect(self) -> None:
        """Ends every connection; new ones are accepted."""
        with self._changed:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._connections.clear()

    def hellos(self) -> list[pod_pb2.RankHello]:
        """Every hello so far."""
        with self._changed:
            return [request.hello for request in self.requests if request.HasField("hello")]

    @property
    def aborts(self) -> list[tuple[str, int]]:
        """("started" or "done", epoch) of any rank, in order."""
        found: list[tuple[str, int]] = []
        with self._changed:
            for request in self.requests:
                match request.WhichOneof("request"):
                    case "abort_started":
                        found.append(("started", request.abort_started.epoch))
                    case "abort_done":
                        found.append(("done", request.abort_done.epoch))
        return found

    def held(self, rank: int) -> dict[str, int]:
        """Bytes of a rank's arenas by kind."""
        with self._changed:
            return {arena.kind: manifest.bytes for arena, (_, manifest) in self.arenas.items() if arena.rank == rank}

    def wait_for_ports(self, count: int, timeout: float) -> dict[int, int]:
        """The ports of that many ranks, once they said hello."""
        with self._changed:
            complete = self._changed.wait_for(lambda: len(self._ports) >= count, timeout)
            assert complete, f"only {self._ports} said hello"
            return dict(self._ports)

    def forget(self, rank: int) -> None:
        """A rank's process is to be replaced: its port is that of its next hello."""
        with self._changed:
            self._ports.pop(rank, None)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._changed:
                self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (received := receive_message(connection, pod_pb2.RankLinkRequest)) is not None:
                request, descriptors = received
                with self._changed:
                    self.requests.append(request)
                    response, answered = self._answer(request, descriptors)
                    self._changed.notify_all()
                if not self.silent:
                    send_message(connection, response, answered)

    def _answer(
        self, request: pod_pb2.RankLinkRequest, descriptors: list[int]
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]]:
        response = pod_pb2.RankLinkResponse(id=request.id, instance_id=self.instance_id)
        match request.WhichOneof("request"):
            case "hello":
                self._ports[request.hello.rank] = request.hello.port
            case "store_arena":
                manifest = request.store_arena.manifest
                self._release(ArenaId.from_proto(manifest.id))
                self.arenas[ArenaId.from_proto(manifest.id)] = (descriptors[0], manifest)
            case "fetch_arena":
                stored = self.arenas.get(ArenaId.from_proto(request.fetch_arena.arena))
                if stored is not None:
                    response.manifest.CopyFrom(stored[1])
                    return response, [stored[0]]
            case "update_manifest":
                manifest = request.update_manifest.manifest
                arena_id = ArenaId.from_proto(manifest.id)
                if arena_id not in self.arenas:
                    response.error = f"no {arena_id}"
                else:
                    self.arenas[arena_id] = (self.arenas[arena_id][0], manifest)
            case "move_arena":
                move = request.move_arena
                source = ArenaId.from_proto(move.arena)
                descriptor, manifest = self.arenas.pop(source)
                manifest.id.number = move.to
                target = ArenaId.from_proto(manifest.id)
                self._release(target)
                self.arenas[target] = (descriptor, manifest)
            case "release_arena":
                self._release(ArenaId.from_proto(request.release_arena.arena))
        return response, []

    def _release(self, arena_id: ArenaId) -> None:
        stored = self.arenas.pop(arena_id, None)
        if stored is not None:
            os.close(stored[0])
