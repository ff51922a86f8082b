"""Keeps a rank's committed weights in a file, in the background."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.persisted import ShardFiles, WritingCancelledError

_logger = logging.getLogger(__name__)

Report = Callable[[pb.PersistStatus], None]


class Persister:
    """One version at a time, the newest. Used by the computing thread."""

    def __init__(self, rank: int, report: Report) -> None:
        """report: shows how far it is."""
        self._rank = rank
        self._report = report
        self._files: ShardFiles | None = None
        self._cancelled = threading.Event()
        self._thread: threading.Thread | None = None

    def choose(self, folder: str) -> ShardFiles | None:
        """Where versions are kept from now on; "": nowhere."""
        self._files = ShardFiles(Path(folder), self._rank) if folder else None
        return self._files

    def keep(self, arena: Arena, manifest: pb.ArenaManifest) -> None:
        """Writes these weights, which have been committed, unless they are there; version 0 is the checkpoint."""
        files = self._files
        if files is None or not manifest.weight_version:
            return
        self.cancel()
        self._cancelled = cancelled = threading.Event()
        self._report(pb.PersistStatus(writing=manifest.weight_version))
        self._thread = threading.Thread(
            target=self._write, args=(files, arena, manifest, cancelled), name="persist weights", daemon=True
        )
        self._thread.start()

    def cancel(self) -> None:
        """The arena is about to change: what is being written is given up. Idempotent."""
        self._cancelled.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()

    def prune(self, keep: int) -> None:
        """Removes older versions."""
        if self._files is None:
            return
        try:
            self._files.prune(keep)
        except OSError as error:
            _logger.warning("older weights could not be removed: %s", error)

    def _write(self, files: ShardFiles, arena: Arena, manifest: pb.ArenaManifest, cancelled: threading.Event) -> None:
        version = manifest.weight_version
        error = ""
        try:
            if version in files.versions():
                self._report(pb.PersistStatus(version=version))
                return
            with torch.inference_mode():
                files.write(arena, manifest, cancelled)
            _logger.info("version %d of the weights is in %s", version, files.folder)
        except WritingCancelledError as cancellation:
            _logger.info("%s", cancellation)
        except OSError as failure:
            error = f"version {version} of the weights could not be written: {failure}"
            _logger.error("%s", error)
        self._report(pb.PersistStatus(version=max(files.versions(), default=0), error=error))
