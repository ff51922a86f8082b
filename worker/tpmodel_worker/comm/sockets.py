"""TCP connections that a library keeps to itself: found when they are opened, and cut when that is needed."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_DESCRIPTORS = Path("/proc/self/fd")


class Connections:
    """The connections of one address that were opened while `opening` ran."""

    def __init__(self, address: str) -> None:
        """address: the local IP of those that count."""
        self._address = address
        self._found: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """What is opened in this block, in whichever thread, is found at its end."""
        before = _sockets()
        yield
        new = _sockets() - before
        self._found = [(descriptor, inode) for descriptor, inode in new if self._is_ours(descriptor)]

    def __len__(self) -> int:
        return len(self._found)

    def cut(self) -> None:
        """Ends all of them for both sides. The descriptors stay their owner's. From any thread; idempotent."""
        found, self._found = self._found, []
        for descriptor, inode in found:
            with contextlib.suppress(OSError), _duplicate(descriptor, inode) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def _is_ours(self, descriptor: int) -> bool:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                local = connection.getsockname()
                connection.getpeername()  # fails for one that only listens
        except OSError:
            return False
        return isinstance(local, tuple) and local[0] == self._address


def _sockets() -> set[tuple[int, int]]:
    """Descriptor and inode of every socket of this process: a descriptor's number is used again, an inode is not."""
    found: set[tuple[int, int]] = set()
    for entry in _DESCRIPTORS.iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            if target.startswith("socket:"):
                found.add((int(entry.name), int(target.removeprefix("socket:[").removesuffix("]"))))
    return found


@contextlib.contextmanager
def _duplicate(descriptor: int, inode: int) -> Iterator[socket.socket]:
    """A socket of one's own for the descriptor; OSError when it is another one by now."""
    duplicate = os.dup(descriptor)
    if os.fstat(duplicate).st_ino != inode:
        os.close(duplicate)
        raise OSError("the descriptor belongs to another socket")
    with socket.socket(fileno=duplicate) as connection:
        yield connection
