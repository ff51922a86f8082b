"""Launches of collectives, and the end of their epoch, which another thread calls for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LAUNCH_SECONDS = 0.3


class EpochOverError(Exception):
    """Nothing may be launched any more; carries why."""


class Launches:
    """Lets launches through, one at a time, until the epoch ends.

    A group that is aborted between a launch's check and the launch itself makes torch connect anew, and wait for peers
    that never come, out of any later abort's reach. So the two exclude each other. Only a launch that takes longer
    than any sound one, since the device's queue is full behind a dead peer, is aborted where it stands.
    """

    def __init__(self, *, launch_seconds: float = _LAUNCH_SECONDS) -> None:
        """launch_seconds: how long an abort waits for a launch that is under way."""
        self._launch_seconds = launch_seconds
        self._launching = threading.Lock()
        # Held while the group is aborted: whoever comes second waits until that is done.
        self._ending = threading.Lock()
        self._over = threading.Event()
        self._reason = ""

    @property
    def over(self) -> bool:
        """Whether the epoch has ended."""
        return self._over.is_set()

    @contextmanager
    def launch(self) -> Iterator[None]:
        """Surrounds a launch.

        Raises:
            EpochOverError: too late.
        """
        with self._launching:
            self.check()
            yield

    def check(self) -> None:
        """Raises EpochOverError once the epoch has ended."""
        if self._over.is_set():
            raise EpochOverError(self._reason)

    def end(self, reason: str, abort: Callable[[], None]) -> None:
        """Lets no launch through any more, and calls abort once. Returns when that is done. Idempotent."""
        with self._ending:
            if self._over.is_set():
                return
            self._reason = reason
            self._over.set()
            launched = self._launching.acquire(timeout=self._launch_seconds)
            try:
                abort()
            finally:
                if launched:
                    self._launching.release()
