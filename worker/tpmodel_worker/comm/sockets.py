"""TCP connections that a library keeps to itself: found when they are opened, and cut when that is needed."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import TypeVar

_DESCRIPTORS = Path("/proc/self/fd")
_LISTENING = threading.Lock()
_ATTEMPTS = 50
"""One takes about a millisecond: it would be a strange chance if other threads began to listen in each of them."""

Listening = TypeVar("Listening")


class Connections:
    """The connections that were opened while `opening` ran, from or to a listener of the library's."""

    def __init__(self, address: str) -> None:
        """address: the local IP of those that count."""
        self._address = address
        self._ports: Set[int] = frozenset()
        self._found: list[tuple[int, int]] = []

    @property
    def ports(self) -> Set[int]:
        """Where the library listens, as `listen` has found."""
        return self._ports

    def listen(self, begin: Callable[[], Listening]) -> Listening:
        """What begin returns: the library's, which listens on one port from then on.

        begin: is called again, and what it has returned is dropped, where other threads began to listen meanwhile:
            whose port is whose cannot be told then.

        Raises:
            OSError: they always did.
        """
        with _LISTENING:
            for _ in range(_ATTEMPTS):
                before = {inode for _, inode in _sockets()}
                begun = begin()
                new = {descriptor for descriptor, inode in _sockets() if inode not in before}
                ports = {port for descriptor in new if (port := self._listener_port(descriptor)) is not None}
                if len(ports) <= 1:
                    self._ports = ports
                    return begun
        raise OSError(f"other threads began to listen on {self._address} again and again")

    @contextlib.contextmanager
    def opening(self, peers: Set[int] | None = None) -> Iterator[None]:
        """What is opened in this block is found at its end; other threads may open connections of their own.

        peers: the ports on which the other members of the group listen; None: not known, so that what other threads
            open counts, too.
        """
        before = _sockets()
        yield
        new = _sockets() - before
        self._found = [(descriptor, inode) for descriptor, inode in new if self._is_ours(descriptor, peers)]

    def __len__(self) -> int:
        return len(self._found)

    def cut(self) -> None:
        """Ends all of them for both sides. The descriptors stay their owner's. From any thread; idempotent."""
        found, self._found = self._found, []
        for descriptor, inode in found:
            with contextlib.suppress(OSError), _duplicate(descriptor, inode) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def _listener_port(self, descriptor: int) -> int | None:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as listener:
                listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                local = listener.getsockname()
        except OSError:
            return None
        return local[1] if listens and isinstance(local, tuple) and local[0] == self._address else None

    def _is_ours(self, descriptor: int, peers: Set[int] | None) -> bool:
        try:
            with socket.socket(fileno=os.dup(descriptor)) as connection:
                local = connection.getsockname()
                peer = connection.getpeername()  # fails for one that only listens
        except OSError:
            return False
        if not isinstance(local, tuple) or local[0] != self._address:
            return False
        return peers is None or local[1] in self._ports or peer[1] in peers


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
