"""Fetches a model from a hub into a cache that other pods may share: each byte once, whoever needs it.

    <cache>/models/<organisation>--<name>/<commit>            the checkpoint, once it is complete
                                          <commit>.partial    what has been fetched of it
                                          <commit>.lock       who is fetching

The folder takes its name when all files are complete. All of it blocks, in threads of its own.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from tpmodel_worker.loading.checkpoint_files import INDEX_NAME, SINGLE_NAME, read_index
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.download_lock import STALE_SECONDS, DownloadLock
from tpmodel_worker.supervisor.download_state import DownloadFailedError, LockLostError, Progress, Turn
from tpmodel_worker.supervisor.fetch import FIRST_PAUSE_SECONDS, INCOMPLETE, Fetcher, Space, disk_space, pause_after
from tpmodel_worker.supervisor.hub import CONFIG, Hub, HubFile, HubUnavailableError, ModelSource, Snapshot

_log = logging.getLogger(__name__)

_CONNECTIONS = 4
_POLL_SECONDS = 0.5
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_SMALL_FILES = frozenset(
    {
        CONFIG,
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.json",
    }
)


class Download:
    """One checkpoint's way into the cache."""

    def __init__(
        self,
        source: ModelSource,
        cache: Path,
        hub: Hub,
        *,
        owner: str,
        gang: str = "",
        attempt: int = 0,
        with_weights: bool = True,
        stale_seconds: float = STALE_SECONDS,
        space: Callable[[Path], Space] = disk_space,
    ) -> None:
        """Args:
        source: which model.
        cache: the folder that may be shared.
        hub: where the model is.
        owner: this pod, for the lock.
        gang: the pod's, for the lock: a higher attempt takes over from a lower one at once.
        attempt: of the gang.
        with_weights: False: configuration and tokenizer only.
        stale_seconds: after how long a silent holder of the lock counts as dead.
        space: tells a folder's file system.
        """
        self._source = source
        self._folder = cache / "models" / f"{source.organisation}--{source.name}"
        self._hub = hub
        self._with_weights = with_weights
        self._make_lock = functools.partial(
            DownloadLock, owner=owner, gang=gang, attempt=attempt, stale_seconds=stale_seconds
        )
        self._space = space
        self._turn = Turn()
        self.progress = Progress(source=str(source))
        self.commit = source.revision if source.is_commit else ""
        """What the revision means; empty until the hub has said it."""

    def cancel(self) -> None:
        """Makes run() raise CancelledError, once its threads notice."""
        self._turn.cancelled.set()

    def release(self) -> None:
        """After cancel(): lets another pod go on, also while a thread still waits for the hub. It writes no more."""
        if self._turn.lock is not None:
            self._turn.lock.release()

    def run(self) -> Path:
        """Returns the folder with the checkpoint, complete; does nothing where it is there already.

        Raises:
            ConfigurationError: no retry helps.
            DownloadFailedError: the hub gives other bytes than it says, or the disk does not work.
            CancelledError: cancel() was called.
        """
        try:
            if self._source.is_commit and (complete := self._target(self._source.revision)).is_dir():
                return complete  # needs no hub
            snapshot = self._resolve()
            target = self._target(snapshot.commit)
            self.commit = snapshot.commit
            self.progress.source = f"hf://{self._source.repository}@{snapshot.commit}"
            self._folder.mkdir(parents=True, exist_ok=True)
            self._take_turns(snapshot, target)
        except OSError as error:
            if error.errno in _FORBIDDEN:
                message = f"{error.filename or self._folder}: {error.strerror}: the cache must be writable"
                raise ConfigurationError(f"{message} for user {os.getuid()}") from error
            raise DownloadFailedError(f"{self._folder}: {error}") from error
        return target

    # ------------------------------------------------------------------------------------------ whose turn

    def _target(self, commit: str) -> Path:
        # Without weights a checkpoint is complete for --load-format dummy only.
        return self._folder / (commit if self._with_weights else f"{commit}.config")

    def _resolve(self) -> Snapshot:
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                return self._hub.snapshot(self._source)
            except HubUnavailableError as error:
                pause = pause_after(error, pause, self.progress, self._turn)

    def _take_turns(self, snapshot: Snapshot, target: Path) -> None:
        """Fetches, or waits for whoever does; in the end the target is there."""
        lock = self._make_lock(target.with_name(f"{target.name}.lock"))
        partial = target.with_name(f"{target.name}.partial")
        while not target.is_dir():
            if not lock.try_acquire():
                self._watch_holder(lock.holder, snapshot, partial)
                continue
            self._turn.lock = lock
            try:
                if not target.is_dir():
                    self._fetch_all(snapshot, partial)
                    _publish(partial, target)
            except LockLostError:
                _log.warning("%s: another pod has taken over, and goes on from here", self.progress.source)
            finally:
                self._turn.lock = None
                lock.release()

    def _watch_holder(self, holder: str, snapshot: Snapshot, partial: Path) -> None:
        """Lets another pod fetch, and shows how far it is."""
        with self.progress.waiting(f"{holder or 'another pod'}, which fetches into the same cache"):
            self.progress.done_bytes = sum(_present(partial).values())
            names = [name for name in self._needed(snapshot, partial) if name in snapshot.files]
            self.progress.total_bytes = sum(snapshot.files[name].size for name in names)
            self._turn.wait(_POLL_SECONDS)

    # ------------------------------------------------------------------------------------------- fetching

    def _fetch_all(self, snapshot: Snapshot, partial: Path) -> None:
        partial.mkdir(exist_ok=True)
        self._turn.abandoned.clear()
        progress = self.progress
        fetcher = Fetcher(
            self._hub, self._source, snapshot.commit, partial, progress=progress, turn=self._turn, space=self._space
        )
        if self._with_weights and INDEX_NAME in snapshot.files:
            # First, since it says which of the other files matter: some repositories have their weights twice.
            fetcher.fetch(snapshot.files[INDEX_NAME])
        wanted = self._wanted(snapshot, partial)
        present = _present(partial)
        progress.total_bytes = sum(file.size for file in wanted)
        progress.done_bytes = sum(min(present.get(file.name, 0), file.size) for file in wanted)
        progress.checked_bytes = 0
        counts = len(wanted), progress.total_bytes, progress.done_bytes
        _log.info("fetching %s: %d files, %d bytes, %d of them here already", progress.source, *counts)
        fetcher.require_room(progress.total_bytes - progress.done_bytes)
        jobs = [lambda file=file: fetcher.fetch(file) for file in wanted]
        _in_threads(jobs, _CONNECTIONS, self._turn.abandoned)

    def _wanted(self, snapshot: Snapshot, partial: Path) -> list[HubFile]:
        """The files that the checkpoint consists of."""
        names, source = self._needed(snapshot, partial), self.progress.source
        if CONFIG not in names:
            raise ConfigurationError(f"{source} has no {CONFIG}: this is no checkpoint that can be served")
        if self._with_weights and not any(name.endswith(".safetensors") for name in names):
            raise ConfigurationError(f"{source} has no safetensors files: other formats are not read")
        for name in names:
            if name not in snapshot.files:
                raise ConfigurationError(f"{source}: {name} is named by {INDEX_NAME}, but missing")
        return [snapshot.files[name] for name in names]

    def _needed(self, snapshot: Snapshot, partial: Path) -> list[str]:
        """Configuration, tokenizer, templates, and of the weights what the loader will look for."""
        found = [name for name in snapshot.files if name in _SMALL_FILES or name.endswith(".jinja")]
        if not self._with_weights:
            return found
        if INDEX_NAME in snapshot.files:
            try:
                index = read_index(partial) or {}
            except CheckpointError as error:
                raise ConfigurationError(f"{self.progress.source}: {error}") from error
            return [*found, INDEX_NAME, *sorted(set(index.values()))]
        if SINGLE_NAME in snapshot.files:
            return [*found, SINGLE_NAME]
        return [*found, *(name for name in snapshot.files if name.endswith(".safetensors"))]


def _present(partial: Path) -> dict[str, int]:
    """Bytes that are there of each file, complete or not."""
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for entry in partial.iterdir():
            with contextlib.suppress(FileNotFoundError):
                found[entry.name.removesuffix(INCOMPLETE)] = entry.stat().st_size
    return found


def _publish(partial: Path, target: Path) -> None:
    """Gives the complete folder its name, for good."""
    _sync(partial)
    try:
        partial.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(partial)  # somebody who took this process for dead has been faster
    _sync(target.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _in_threads(jobs: Sequence[Callable[[], None]], count: int, failed: threading.Event) -> None:
    """Does the jobs in a few threads; raises what the first of them raised, once all have ended.

    failed: set when one raises, for the others to look at.
    """
    waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
    for job in jobs:
        waiting.put(job)
    errors: list[BaseException] = []

    def work() -> None:
        while not errors:
            try:
                job = waiting.get_nowait()
            except Empty:
                return
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - raised again by whoever waits
                errors.append(error)
                failed.set()

    threads = [threading.Thread(target=work, name="download", daemon=True) for _ in range(min(count, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
