"""A lock on a folder that several machines may share: a file that only one of them can create.

flock means nothing on some network file systems; exclusive creation works on all. The file says who holds the lock,
and a number that rises while the holder lives. Nobody's clock is compared with anybody else's: a lock is stale for
whoever has seen it unchanged for a minute of its own time, and at once for a pod of the same gang at a higher attempt:
the holder's whole gang was told to end. Two holders at once cannot be ruled out (one may have been stopped for that
minute), so what is done under the lock must survive it; the one that has lost the lock finds out.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_log = logging.getLogger(__name__)

STALE_SECONDS = 60.0
_BEATS = 6
"""How often a holder shows that it lives within the time after which it would count as dead."""


class DownloadLock:
    """One process's part of a lock."""

    def __init__(
        self,
        path: Path,
        owner: str,
        *,
        gang: str = "",
        attempt: int = 0,
        stale_seconds: float = STALE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        path: the file.
        owner: who this is, unique among all that live; what it had held before it died is its own.
        gang: which gang the owner belongs to, unique among all that use the folder; "": none.
        attempt: the gang's, as the owner knows it.
        stale_seconds: after how long a silent holder counts as dead.
        clock: seconds.
        """
        self._path = path
        self._owner = owner
        self._gang = gang
        self._attempt = attempt
        self._stale_seconds = stale_seconds
        self._clock = clock
        self._descriptor: int | None = None
        self._beating: threading.Thread | None = None
        self._released = threading.Event()
        self._seen = b""
        self._seen_since = 0.0
        self.holder = ""
        """Who held the lock when it was last asked for in vain."""
        self.lost = False
        """Whether somebody else took the lock over while it was held here."""

    def try_acquire(self) -> bool:
        """Takes the lock if nobody has it, or whoever has it is dead. Raises OSError."""
        try:
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            if not self._is_dead():
                return False
            self._remove_dead()
            return self.try_acquire()
        self.lost = False
        self._released.clear()
        try:
            self._write(0)
        except OSError:
            self.release()
            raise
        self._beating = threading.Thread(target=self._beat, name="download lock", daemon=True)
        self._beating.start()
        return True

    def release(self) -> None:
        """Gives the lock back. Idempotent."""
        self._released.set()
        if self._beating is not None:
            self._beating.join()
            self._beating = None
        if self._descriptor is not None:
            if self._is_mine():
                self._path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def _is_dead(self) -> bool:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return False  # just released: the next try will show
        now = self._clock()
        if content != self._seen:
            self._seen, self._seen_since = content, now
        holder = _Holder.read(content)
        self.holder = holder.owner
        superseded = bool(self._gang) and holder.gang == self._gang and holder.attempt < self._attempt
        return holder.owner == self._owner or superseded or now - self._seen_since >= self._stale_seconds

    def _remove_dead(self) -> None:
        """Removes the file that was seen; of several that try, one does."""
        grave = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex}")
        with contextlib.suppress(FileNotFoundError):
            if self._path.read_bytes() == self._seen:
                self._path.rename(grave)
                grave.unlink()
        self._seen = b""

    def _beat(self) -> None:
        count = 0
        while not self._released.wait(self._stale_seconds / _BEATS):
            count += 1
            if not self._is_mine():
                self.lost = True
                return
            try:
                self._write(count)
            except OSError as error:
                _log.warning("%s: %s", self._path, error)  # if it stays so, others will see a dead holder

    def _write(self, count: int) -> None:
        # Through the descriptor: if the lock was taken over, this goes to the file that is none any more.
        assert self._descriptor is not None
        content = json.dumps(
            {"owner": self._owner, "gang": self._gang, "attempt": self._attempt, "beat": f"{count:012d}"}
        )
        os.pwrite(self._descriptor, content.encode(), 0)
        os.fsync(self._descriptor)

    def _is_mine(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._descriptor))
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who holds a lock, as its file says."""

    owner: str = ""
    gang: str = ""
    attempt: int = 0

    @classmethod
    def read(cls, content: bytes) -> Self:
        try:
            found = json.loads(content)
            return cls(str(found["owner"]), str(found.get("gang", "")), int(found.get("attempt", 0)))
        except (ValueError, KeyError, TypeError):
            return cls()  # its maker has not come to write it, or has died before
