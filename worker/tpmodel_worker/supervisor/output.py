"""What the pod's processes print, line by line, labelled with the process."""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import Callable
from typing import Literal

from tpmodel_worker.logs import text_label

LinePrinter = Callable[[str, str], None]
"""Called with a process's name and one line that it printed, without its end."""

_MAX_LINE_BYTES = 64 * 1024
_KEPT_LINES = 20


def label(process: str, line: str, log_format: Literal["text", "json"]) -> str:
    """The line as the supervisor prints it.

    Log records pass as they are, since they name their process. As text, any other line gets the name in brackets
    before it; as JSON, it is wrapped.
    """
    if log_format == "text":
        start = text_label(process)
        return line if line.startswith(start) else start + line
    return line if line.startswith("{") else json.dumps({"process": process, "message": line})


class OutputReader(asyncio.Protocol):
    """Splits one pipe into lines, hands them on, and keeps the last ones."""

    def __init__(self, process: str, print_line: LinePrinter) -> None:
        self.process = process
        self._print_line = print_line
        self._rest = b""
        self._transport: asyncio.BaseTransport | None = None
        self.last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self.ended = asyncio.get_running_loop().create_future()
        """Done once every writer has closed the pipe."""

    @classmethod
    async def read(cls, descriptor: int, process: str, print_line: LinePrinter) -> OutputReader:
        """Starts reading a pipe's end, which now belongs to the reader."""
        _, reader = await asyncio.get_running_loop().connect_read_pipe(
            lambda: cls(process, print_line), os.fdopen(descriptor, "rb", buffering=0)
        )
        return reader

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio when the pipe is being read."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Called by asyncio with what was printed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._emit(line)
        while len(self._rest) > _MAX_LINE_BYTES:
            self._emit(self._rest[:_MAX_LINE_BYTES])
            self._rest = self._rest[_MAX_LINE_BYTES:]

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio at the pipe's end."""
        if self._rest:
            self._emit(self._rest)
            self._rest = b""
        if not self.ended.done():
            self.ended.set_result(None)

    def close(self) -> None:
        """Stops reading, also while something still holds the pipe. Idempotent."""
        if self._transport is not None:
            self._transport.close()

    def _emit(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip("\r")
        self.last_lines.append(text)
        self._print_line(self.process, text)
