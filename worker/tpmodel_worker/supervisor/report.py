"""The Unix socket on which engine and api processes report, and on which the engine is told to drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.framing import FrameTooLargeError, frame, read_message

_log = logging.getLogger(__name__)

ENGINE = "engine"
_SEND_SECONDS = 5.0


class ReportServer:
    """Keeps what engine and api processes last said, for as long as their connections live."""

    def __init__(
        self,
        path: Path,
        *,
        on_state: Callable[[worker_pb2.EngineState], None],
        on_change: Callable[[], None],
    ) -> None:
        """on_state: called with every state of the engine. on_change: called when anything else may have changed."""
        self._path = path
        self._on_state = on_state
        self._on_change = on_change
        self._server: asyncio.Server | None = None
        self._engine: asyncio.StreamWriter | None = None
        self._engine_gone = asyncio.Event()
        self._engine_gone.set()
        self._listening: dict[str, asyncio.StreamWriter] = {}
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def listening(self) -> frozenset[str]:
        """Names of the api processes that listen on their ports."""
        return frozenset(self._listening)

    async def start(self) -> None:
        """Listens. Raises OSError when the socket cannot be made."""
        self._server = await asyncio.start_unix_server(self._accept, self._path)

    async def stop(self) -> None:
        """Closes the socket and every connection."""
        if self._server is not None:
            self._server.close()
        connections = list(self._connections)
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def send_to_engine(self, command: pod_pb2.EngineCommand) -> bool:
        """Sends the engine a command; False where it is not connected or does not take it."""
        if self._engine is None:
            return False
        try:
            self._engine.write(frame(command))
            async with asyncio.timeout(_SEND_SECONDS):
                await self._engine.drain()
        except (ConnectionError, TimeoutError):
            return False
        return True

    async def engine_gone(self, seconds: float) -> None:
        """Waits, so long at most, until the last report of the engine has been read and its connection has ended."""
        try:
            async with asyncio.timeout(seconds):
                await self._engine_gone.wait()
        except TimeoutError:
            _log.warning("the engine's report connection is still open %.1f s after its end", seconds)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve_connection(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = ""
        try:
            while (report := await read_message(reader, pod_pb2.ProcessReport)) is not None:
                name = name or report.name
                self._note(name, report, writer)
        except (ConnectionError, asyncio.IncompleteReadError, FrameTooLargeError, DecodeError) as error:
            _log.warning("report connection of %s: %s", name or "an unnamed process", error)
        finally:
            writer.close()
            if self._engine is writer:
                self._engine = None
                self._engine_gone.set()
            if self._listening.get(name) is writer:
                del self._listening[name]
            self._on_change()

    def _note(self, name: str, report: pod_pb2.ProcessReport, writer: asyncio.StreamWriter) -> None:
        if name == ENGINE:
            self._engine = writer
            self._engine_gone.clear()
            if report.HasField("engine_state"):
                self._on_state(report.engine_state)
        elif report.listening:
            self._listening[name] = writer
        else:
            self._listening.pop(name, None)
        self._on_change()
