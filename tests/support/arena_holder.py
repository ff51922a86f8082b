"""A supervisor's rank socket without a supervisor: holds arenas in memory, in threads of the test's process."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path
from typing import Self

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.framing import receive_message, send_message


class ArenaHolder:
    """Answers every request of the rank link; a context manager."""

    def __init__(self, path: Path, *, instance_id: str = "engine-1") -> None:
        self.path = path
        self.instance_id = instance_id
        self.arenas: dict[ArenaId, tuple[int, worker_pb2.ArenaManifest]] = {}
        self.requests: list[pod_pb2.RankLinkRequest] = []
        self.silent = False
        """Set, nothing is answered any more."""
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disconnect()
        # Closing alone does not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for descriptor, _manifest in self.arenas.values():
                os.close(descriptor)
            self.arenas.clear()

    def disconnect(self) -> None:
        """Ends every connection, as the death of a supervisor would."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                connection.close()
            self._connections.clear()

    def hellos(self) -> list[pod_pb2.RankHello]:
        """Every hello so far."""
        with self._lock:
            return [request.hello for request in self.requests if request.HasField("hello")]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (received := receive_message(connection, pod_pb2.RankLinkRequest)) is not None:
                request, descriptors = received
                with self._lock:
                    self.requests.append(request)
                    response, answered = self._answer(request, descriptors)
                if not self.silent:
                    send_message(connection, response, answered)

    def _answer(
        self, request: pod_pb2.RankLinkRequest, descriptors: list[int]
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]]:
        response = pod_pb2.RankLinkResponse(id=request.id, instance_id=self.instance_id)
        match request.WhichOneof("request"):
            case "store_arena":
                manifest = request.store_arena.manifest
                self._forget(ArenaId.from_proto(manifest.id))
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
            case "release_arena":
                self._forget(ArenaId.from_proto(request.release_arena.arena))
        return response, []

    def _forget(self, arena_id: ArenaId) -> None:
        stored = self.arenas.pop(arena_id, None)
        if stored is not None:
            os.close(stored[0])
