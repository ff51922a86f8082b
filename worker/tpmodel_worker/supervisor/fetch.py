"""One file's way from the hub to the disk: resumed where it broke off, checked, fetched again when it is wrong.

A file is fetched as NAME.incomplete and takes its name when size and digest are right.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.download_state import DownloadFailedError, Progress, Turn
from tpmodel_worker.supervisor.hub import Hub, HubFile, HubUnavailableError, ModelSource

_log = logging.getLogger(__name__)

INCOMPLETE = ".incomplete"
FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 30.0
_ROOM_SECONDS = 2.0
_MAX_MISMATCHES = 3
_DIGEST_BLOCK_BYTES = 4 * 1024 * 1024
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Space(NamedTuple):
    """Bytes of a file system."""

    total: int
    free: int


def disk_space(folder: Path) -> Space:
    """What the operating system says; some network file systems say 0 in all, and are believed to have room."""
    status = os.statvfs(folder)
    if not status.f_blocks:
        return Space(0, 1 << 62)
    return Space(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


def pause_after(error: HubUnavailableError, seconds: float, progress: Progress, turn: Turn) -> float:
    """Waits after a failure of the hub; how long to wait after the next one."""
    _log.warning("%s; trying again in %.0f s", error, seconds)
    with progress.waiting(f"the hub: {error}"):
        turn.wait(seconds)
    return min(2 * seconds, _LONGEST_PAUSE_SECONDS)


class Fetcher:
    """Fetches files of one commit into one folder; several threads may share it."""

    def __init__(
        self,
        hub: Hub,
        source: ModelSource,
        commit: str,
        folder: Path,
        *,
        progress: Progress,
        turn: Turn,
        space: Callable[[Path], Space],
    ) -> None:
        """space: tells a folder's file system."""
        self._hub = hub
        self._source = source
        self._commit = commit
        self._folder = folder
        self._progress = progress
        self._turn = turn
        self._space = space

    def fetch(self, file: HubFile) -> None:
        """Fetches what is missing of one file, and checks all of it; nothing where it is there already.

        Raises:
            ConfigurationError: no retry helps.
            DownloadFailedError: the hub gives other bytes than it says.
            CancelledError, LockLostError: the turn is over.
        """
        target = self._folder / file.name
        if target.is_file() and target.stat().st_size == file.size:
            self._progress.add(checked=file.size)
            return
        incomplete = self._folder / f"{file.name}{INCOMPLETE}"
        expected, mismatch = file.sha256 or file.git_sha1, ""
        for _ in range(_MAX_MISMATCHES):
            self._complete(file, incomplete)
            found = self._digest(file, incomplete)
            self._turn.check()
            if found == expected:
                incomplete.rename(target)
                return
            mismatch = f"{file.name}: {'sha256' if file.sha256 else 'git sha1'} {found} instead of {expected}"
            _log.warning("%s: %s: fetching it again", self._progress.source, mismatch)
            incomplete.unlink()
            self._progress.add(done=-file.size, checked=-file.size)
        raise DownloadFailedError(f"{self._progress.source}: {mismatch}, {_MAX_MISMATCHES} times")

    def require_room(self, needed: int) -> None:
        """Waits until there is room: somebody may delete something, or make the volume larger, and it goes on.

        That it lasts too long is for whoever watches the progress to say.

        Raises:
            ConfigurationError: the whole file system is too small.
        """
        while (space := self._space(self._folder)).free < needed:
            message = f"{self._folder}: no room: {needed} bytes are needed, {space.free} are free"
            if needed > space.total > 0:
                raise ConfigurationError(f"{message} of {space.total} in all: give the cache a larger volume")
            if not self._progress.room_missing:
                _log.warning("%s: waiting", message)
            reason = f"room in {self._folder}: {needed} bytes are needed, {space.free} are free"
            with self._progress.waiting(reason, room_missing=True):
                self._turn.wait(_ROOM_SECONDS)

    def _complete(self, file: HubFile, incomplete: Path) -> None:
        """Fetches, in as many requests as it takes, until all bytes are there."""
        pause = FIRST_PAUSE_SECONDS
        descriptor = os.open(incomplete, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while (offset := os.fstat(descriptor).st_size) < file.size:
                try:
                    with self._hub.read(self._source, self._commit, file, offset) as chunks:
                        end = self._write(chunks, descriptor, offset, file.size)
                    if end == offset:
                        raise HubUnavailableError(f"{file.name}: the hub sent nothing from byte {offset} on")
                    pause = FIRST_PAUSE_SECONDS
                except HubUnavailableError as error:
                    pause = pause_after(error, pause, self._progress, self._turn)
            os.ftruncate(descriptor, file.size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _write(self, chunks: Iterator[bytes], descriptor: int, offset: int, size: int) -> int:
        """Writes what comes to its place; where it ends. Never appends: whoever has taken the lock over meanwhile
        writes the same bytes to the same places."""
        for chunk in chunks:
            rest = memoryview(chunk)[: size - offset]
            while rest:
                self._turn.check()
                try:
                    written = os.pwrite(descriptor, rest, offset)
                except OSError as error:
                    if error.errno not in _FULL:
                        raise
                    self.require_room(size - offset)
                    continue
                rest = rest[written:]
                offset += written
                self._progress.add(done=written)
        return offset

    def _digest(self, file: HubFile, path: Path) -> str:
        if file.sha256:
            digest = hashlib.sha256()
        else:
            # As git names contents; nothing here rests on SHA-1 being hard to forge.
            digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as content:
            while block := content.read(_DIGEST_BLOCK_BYTES):
                self._turn.check()
                digest.update(block)
                self._progress.add(checked=len(block))
        return digest.hexdigest()
