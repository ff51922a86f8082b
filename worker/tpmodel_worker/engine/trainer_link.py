"""A silent connection to the trainer's store, whose end says that the trainer has gone."""

from __future__ import annotations

import asyncio
from typing import Self

import grpc

from tpmodel_worker.engine.weight_errors import UpdateError

_CONNECT_SECONDS = 3.0


class TrainerLink:
    """One connection; nothing is ever sent over it, so that the store takes no notice of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, host: str, port: int) -> Self:
        """Connects. Raises UpdateError where nobody listens."""
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                return cls(*await asyncio.open_connection(host, port))
        except (OSError, TimeoutError) as error:
            message = f"the trainer's store at {host}:{port} can't be reached: {error or 'no answer'}"
            raise UpdateError(grpc.StatusCode.UNAVAILABLE, message) from error

    async def gone(self) -> None:
        """Returns when the trainer's side, or close(), has ended the connection."""
        try:
            while await self._reader.read(4096):
                pass
        except OSError:
            return

    def close(self) -> None:
        """Ends the connection. Idempotent."""
        self._writer.close()
