"""What the threads of a download share: how far it is, whether it may go on, how it can fail."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from tpmodel_worker.supervisor.download_lock import DownloadLock


class DownloadFailedError(Exception):
    """No checkpoint came; another try, perhaps elsewhere, may have more luck."""


class CancelledError(Exception):
    """The download was told to stop."""


class LockLostError(Exception):
    """Somebody else took this process for dead, and fetches now."""


@dataclass(slots=True)
class Progress:
    """How far a download is. Written by its threads, read by any."""

    source: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    checked_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waits: dict[int, tuple[str, bool]] = field(default_factory=dict)

    @property
    def waiting_for(self) -> str:
        """What keeps it, or one of its threads, from going on; empty: nothing."""
        return next((reason for reason, _ in list(self._waits.values())), "")

    @property
    def room_missing(self) -> bool:
        """Whether it waits for room on the disk."""
        return any(room for _, room in list(self._waits.values()))

    def add(self, done: int = 0, checked: int = 0) -> None:
        """More bytes have come, or been checked."""
        with self._lock:
            self.done_bytes += done
            self.checked_bytes += checked

    @contextlib.contextmanager
    def waiting(self, reason: str, *, room_missing: bool = False) -> Iterator[None]:
        """Shows what this thread waits for, meanwhile."""
        thread = threading.get_ident()
        self._waits[thread] = (reason, room_missing)
        try:
            yield
        finally:
            del self._waits[thread]


class Turn:
    """Whether this process may write into the cache: asked before every write."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.abandoned = threading.Event()
        """One file cannot be had: the others need not come either."""
        self.lock: DownloadLock | None = None

    def check(self) -> None:
        """Raises CancelledError or LockLostError when the turn is over."""
        if self.cancelled.is_set() or self.abandoned.is_set():
            raise CancelledError
        if self.lock is not None and self.lock.lost:
            raise LockLostError

    def wait(self, seconds: float) -> None:
        """Lets time pass. Raises as check(); at once when cancelled."""
        self.cancelled.wait(seconds)
        self.check()
