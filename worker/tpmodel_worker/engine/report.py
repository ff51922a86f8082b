"""The engine's line to the supervisor: its state out, commands in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from google.protobuf.message import DecodeError

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.framing import FrameTooLargeError, frame, read_message

logger = logging.getLogger(__name__)

NAME = "engine"
_RECONNECT_SECONDS = 0.2
_SEND_SECONDS = 10.0


class SupervisorLink:
    """Keeps a connection to the supervisor's report socket."""

    def __init__(self, path: Path, status: EngineStatus, on_drain: Callable[[float], None]) -> None:
        """on_drain: called with the seconds that running streams have left."""
        self._path = path
        self._status = status
        self._on_drain = on_drain

    async def run(self) -> None:
        """Connects, and again when the connection breaks, until cancelled."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path))
            except OSError:
                await asyncio.sleep(_RECONNECT_SECONDS)
                continue
            try:
                await self._talk(reader, writer)
            except (OSError, TimeoutError, asyncio.IncompleteReadError, FrameTooLargeError, DecodeError) as error:
                logger.warning("the connection to the supervisor broke: %s", error)
            finally:
                writer.close()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        changed = asyncio.Event()

        def note(_state: worker_pb2.EngineState) -> None:
            changed.set()

        stop_listening = self._status.listen(note)
        pushing = asyncio.create_task(self._push(writer, changed), name="state to the supervisor")
        reading = asyncio.create_task(self._read(reader), name="commands of the supervisor")
        try:
            done, _ = await asyncio.wait({pushing, reading}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            stop_listening()
            pushing.cancel()
            reading.cancel()
            await asyncio.gather(pushing, reading, return_exceptions=True)

    async def _push(self, writer: asyncio.StreamWriter, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            # Always the newest: a supervisor that is slow to read misses what is outdated anyway.
            writer.write(frame(pod_pb2.ProcessReport(name=NAME, engine_state=self._status.state)))
            async with asyncio.timeout(_SEND_SECONDS):
                await writer.drain()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (command := await read_message(reader, pod_pb2.EngineCommand)) is not None:
            if command.HasField("drain"):
                self._on_drain(command.drain.timeout_seconds)
