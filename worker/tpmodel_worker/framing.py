"""Protobuf messages over Unix stream sockets: a little-endian 32-bit length, then the message."""

from __future__ import annotations

import array
import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import TypeVar

from google.protobuf.message import Message

M = TypeVar("M", bound=Message)

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 256 * 1024 * 1024
_MAX_DESCRIPTORS = 4


class FrameTooLargeError(Exception):
    """A peer announced a message longer than MAX_FRAME_BYTES."""


def frame(message: Message) -> bytes:
    """The message as it goes over the socket."""
    body = message.SerializeToString()
    return _LENGTH.pack(len(body)) + body


async def read_message(reader: asyncio.StreamReader, message_type: type[M]) -> M | None:
    """Reads one message; None when the peer has closed the connection between messages."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    if length > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"{length} bytes announced, at most {MAX_FRAME_BYTES} accepted")
    return message_type.FromString(await reader.readexactly(length))


def send_message(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Sends one message on a blocking socket, with file descriptors beside its first byte."""
    data = memoryview(frame(message))
    sent = socket.send_fds(connection, [data], list(descriptors)) if descriptors else connection.send(data)
    connection.sendall(data[sent:])


def receive_message(connection: socket.socket, message_type: type[M]) -> tuple[M, list[int]] | None:
    """Reads one message and the descriptors beside it from a blocking socket; None at its end."""
    descriptors = array.array("i")
    header = bytearray()
    while len(header) < _LENGTH.size:
        part, received, _, _ = socket.recv_fds(connection, _LENGTH.size - len(header), _MAX_DESCRIPTORS)
        descriptors.extend(received)
        if not part:
            if header:
                raise ConnectionResetError("the peer closed the connection inside a message")
            return None
        header += part
    (length,) = _LENGTH.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise FrameTooLargeError(f"{length} bytes announced, at most {MAX_FRAME_BYTES} accepted")
    body = bytearray(length)
    view = memoryview(body)
    while view:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionResetError("the peer closed the connection inside a message")
        view = view[count:]
    return message_type.FromString(bytes(body)), list(descriptors)
