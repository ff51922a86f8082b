"""The supervisor's end of the rank socket, reduced to what a rank needs, for tests of ranks without a supervisor."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.framing import receive_message, send_message


class RankLink:
    """Holds arenas for ranks and notes what they say, in threads, until it is closed."""

    def __init__(self, path: Path, *, instance_id: str = "") -> None:
        self.instance_id = instance_id
        self.ports: dict[int, int] = {}
        self.aborts: list[tuple[str, int]] = []
        """("started" or "done", epoch) of any rank, in order."""
        self._arenas: dict[tuple[int, str, int], tuple[int, worker_pb2.ArenaManifest]] = {}
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def wait_for_ports(self, count: int, timeout: float) -> dict[int, int]:
        """The ports of that many ranks, once they said hello."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ports) >= count, timeout), f"only {self.ports} said hello"
            return dict(self.ports)

    def forget(self, rank: int) -> None:
        """A rank's process is to be replaced."""
        with self._changed:
            self.ports.pop(rank, None)

    def held(self, rank: int) -> dict[str, int]:
        """Bytes of a rank's arenas by kind."""
        with self._changed:
            return {kind: found[1].bytes for (owner, kind, _), found in self._arenas.items() if owner == rank}

    def close(self) -> None:
        """Ends every connection, as the supervisor's death would, and releases all memory."""
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        with self._changed:
            for descriptor, _ in self._arenas.values():
                os.close(descriptor)
            self._arenas.clear()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while (received := receive_message(connection, pod_pb2.RankLinkRequest)) is not None:
                response, descriptors = self._answer(*received)
                send_message(connection, response, descriptors)

    def _answer(
        self, request: pod_pb2.RankLinkRequest, descriptors: list[int]
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]]:
        response = pod_pb2.RankLinkResponse(id=request.id, instance_id=self.instance_id)
        with self._changed:
            match request.WhichOneof("request"):
                case "hello":
                    self.ports[request.hello.rank] = request.hello.port
                case "store_arena":
                    manifest = request.store_arena.manifest
                    self._release(manifest.id)
                    self._arenas[_key(manifest.id)] = (descriptors[0], manifest)
                case "fetch_arena":
                    found = self._arenas.get(_key(request.fetch_arena.arena))
                    if found is not None:
                        response.manifest.CopyFrom(found[1])
                        return response, [found[0]]
                case "update_manifest":
                    manifest = request.update_manifest.manifest
                    self._arenas[_key(manifest.id)] = (self._arenas[_key(manifest.id)][0], manifest)
                case "release_arena":
                    self._release(request.release_arena.arena)
                case "abort_started":
                    self.aborts.append(("started", request.abort_started.epoch))
                case "abort_done":
                    self.aborts.append(("done", request.abort_done.epoch))
                case unknown:
                    response.error = f"unknown request {unknown}"
            self._changed.notify_all()
        return response, []

    def _release(self, arena: worker_pb2.ArenaId) -> None:
        held = self._arenas.pop(_key(arena), None)
        if held is not None:
            os.close(held[0])


def _key(arena: worker_pb2.ArenaId) -> tuple[int, str, int]:
    return arena.rank, arena.kind, arena.number
