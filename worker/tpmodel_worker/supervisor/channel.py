"""Framed messages with file descriptors beside them, over non-blocking Unix sockets in asyncio."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Sequence
from types import TracebackType
from typing import Self, TypeVar

from google.protobuf.message import Message

from tpmodel_worker.framing import MAX_FRAME_BYTES, FrameTooLargeError, frame

M = TypeVar("M", bound=Message)

_LENGTH = struct.Struct("<I")
_MAX_DESCRIPTORS = 4


class DescriptorChannel:
    """One connection; asyncio's own streams cannot carry descriptors. One reader and one writer at a time."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._socket = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def peer_pid(self) -> int:
        """Pid of the process that connected, as the kernel noted it then."""
        credentials = struct.Struct("3i")
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, credentials.size)
        return int(credentials.unpack(raw)[0])

    async def receive(self, message_type: type[M]) -> tuple[M, list[int]] | None:
        """One message and the descriptors beside it, now the caller's to close; None at the connection's end.

        Raises:
            ConnectionError: the peer left inside a message.
            FrameTooLargeError: the announced length is beyond MAX_FRAME_BYTES.
        """
        descriptors: list[int] = []
        try:
            header = await self._receive_header(descriptors)
            if header is None:
                return None
            (length,) = _LENGTH.unpack(header)
            if length > MAX_FRAME_BYTES:
                raise FrameTooLargeError(f"{length} bytes announced, at most {MAX_FRAME_BYTES} accepted")
            return message_type.FromString(await self._receive_exactly(length)), descriptors
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    async def send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        """Sends one message, its descriptors beside its first byte."""
        data = memoryview(frame(message))
        sent = 0
        while sent == 0 and descriptors:
            try:
                sent = socket.send_fds(self._socket, [data], list(descriptors))
            except BlockingIOError:
                await self._wait(writable=True)
        await asyncio.get_running_loop().sock_sendall(self._socket, data[sent:])

    def close(self) -> None:
        """Ends the connection. Idempotent."""
        self._socket.close()

    async def _receive_header(self, descriptors: list[int]) -> bytes | None:
        header = b""
        while len(header) < _LENGTH.size:
            try:
                part, received, _, _ = socket.recv_fds(
                    self._socket, _LENGTH.size - len(header), _MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await self._wait(writable=False)
                continue
            descriptors.extend(received)
            if not part:
                if header:
                    raise ConnectionResetError("the peer closed the connection inside a message")
                return None
            header += part
        return header

    async def _receive_exactly(self, length: int) -> bytes:
        body = bytearray(length)
        view = memoryview(body)
        while view:
            count = await asyncio.get_running_loop().sock_recv_into(self._socket, view)
            if count == 0:
                raise ConnectionResetError("the peer closed the connection inside a message")
            view = view[count:]
        return bytes(body)

    async def _wait(self, *, writable: bool) -> None:
        loop = asyncio.get_running_loop()
        ready = loop.create_future()
        descriptor = self._socket.fileno()
        add, remove = (loop.add_writer, loop.remove_writer) if writable else (loop.add_reader, loop.remove_reader)
        add(descriptor, _resolve, ready)
        try:
            await ready
        finally:
            remove(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
