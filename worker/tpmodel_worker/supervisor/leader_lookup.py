"""Where the leader pod is: asked of the name service again and again, since gRPC itself would be slow to notice."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Protocol

SEARCH_SECONDS = 0.5
"""Between two lookups while there is no leader to talk to."""
WATCH_SECONDS = 5.0
"""Between two lookups while there is one: a broken connection is noticed by itself, only a leader that moved while
the old one still answers is not. Ten times as often would be most of a large cluster's name lookups."""

Resolve = Callable[[str, socket.AddressFamily], list[str]]
"""A name's addresses of a family; raises OSError when there is none."""


class Leader(Protocol):
    """Tells where the leader pod is."""

    async def find(self) -> str:
        """Its IP, as soon as there is one."""
        ...

    async def moved_from(self, address: str) -> None:
        """Returns once the leader pod is known to have another IP."""
        ...


class KnownLeader:
    """A leader whose address never changes: the pod itself."""

    def __init__(self, address: str) -> None:
        self._address = address

    async def find(self) -> str:
        """The address."""
        return self._address

    async def moved_from(self, address: str) -> None:
        """Never returns."""
        await asyncio.Event().wait()


class NamedLeader:
    """A leader that is known by name. The name service may not know the name yet, or any more, for any time."""

    def __init__(
        self,
        host: str,
        *,
        family: socket.AddressFamily,
        resolve: Resolve | None = None,
        search_seconds: float = SEARCH_SECONDS,
        watch_seconds: float = WATCH_SECONDS,
    ) -> None:
        """family: of this pod's own address; in a cluster of both kinds the two pods talk in one."""
        self._host = host
        self._family = family
        self._resolve = resolve or resolve_name
        self._search_seconds = search_seconds
        self._watch_seconds = watch_seconds

    async def find(self) -> str:
        """The first address that the name has, looked up every 500 ms until it has one."""
        while True:
            addresses = await self._look_up()
            if addresses:
                return addresses[0]
            await asyncio.sleep(self._search_seconds)

    async def moved_from(self, address: str) -> None:
        """Looks the name up now and then. That it has no address at all says nothing about the leader."""
        while True:
            await asyncio.sleep(self._watch_seconds)
            addresses = await self._look_up()
            if addresses and address not in addresses:
                return

    async def _look_up(self) -> list[str]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[str]] = loop.create_future()

        def resolve() -> None:
            try:
                found = self._resolve(self._host, self._family)
            except (OSError, UnicodeError):
                found = []
            loop.call_soon_threadsafe(lambda: answer.done() or answer.set_result(found))

        # A thread that nobody waits for: a name server that does not answer must not delay the end of the process.
        threading.Thread(target=resolve, name="leader lookup", daemon=True).start()
        return await answer


def resolve_name(host: str, family: socket.AddressFamily) -> list[str]:
    """Asks the system's resolver, which may take seconds. Raises OSError."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, family=family, type=socket.SOCK_STREAM)]


def family_of(address: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET
