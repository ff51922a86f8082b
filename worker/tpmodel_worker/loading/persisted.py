"""A rank's weights in a file: written beside serving, read by a gang that starts without memory.

A folder for each model (identity), in it one for each version, in it two files for each rank: the arena's bytes, and
what they are. The second gets its name when the first is whole on the disk.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from google.protobuf import json_format

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.memory import Arena

CHUNK_BYTES = 16 << 20
_PARTIAL = ".partial"


class PersistedWeightsError(Exception):
    """A file is missing, not whole, or not of this model; the message names it."""


class WritingCancelledError(Exception):
    """Newer weights are about to take the arena's place."""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """One rank's files of all versions."""

    folder: Path
    rank: int

    def versions(self) -> list[int]:
        """Those that are whole as far as names and sizes tell, in order."""
        return [version for version in self._versions() if self._is_whole(version)]

    def write(self, arena: Arena, manifest: pb.ArenaManifest, cancelled: threading.Event) -> None:
        """Writes an arena of complete weights at the manifest's version.

        Raises:
            OSError: the disk is full or cannot be written; what was half written is removed.
            WritingCancelledError: cancelled was set; likewise.
        """
        version = manifest.weight_version
        data, description = self._data(version), self._description(version)
        data.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(data) as file:
            for chunk in _chunks(arena):
                if cancelled.is_set():
                    raise WritingCancelledError(f"version {version} is not written any further")
                file.write(chunk.numpy().data)
        with _replacing(description) as file:
            file.write(json_format.MessageToJson(manifest).encode())
        _sync_folder(data.parent)

    def describe(self, version: int) -> pb.ArenaManifest:
        """What the version's file holds. Raises PersistedWeightsError."""
        file = self._description(version)
        try:
            manifest = json_format.Parse(file.read_text(encoding="utf-8"), pb.ArenaManifest())
        except (OSError, UnicodeDecodeError, json_format.ParseError) as error:
            raise PersistedWeightsError(f"{file}: {error}") from error
        if manifest.weight_version != version or manifest.state != pb.ARENA_STATE_COMPLETE:
            raise PersistedWeightsError(f"{file} describes version {manifest.weight_version}, not {version}")
        return manifest

    def read(self, version: int, target: torch.Tensor, progress: Callable[[int, int], None]) -> None:
        """Fills a (bytes,) uint8 tensor with the file's beginning; the caller checks digests.

        Raises:
            PersistedWeightsError: it cannot be read, or has less.
        """
        file = self._data(version)
        total, done = target.numel(), 0
        try:
            with file.open("rb") as stream:
                while done < total:
                    place = target[done : done + CHUNK_BYTES]
                    buffer = place if not place.is_cuda else torch.empty(place.numel(), dtype=torch.uint8)
                    if stream.readinto(buffer.numpy().data) != place.numel():
                        raise PersistedWeightsError(f"{file} ends before byte {total}")
                    if buffer is not place:
                        place.copy_(buffer)
                    done += place.numel()
                    progress(done, total)
        except OSError as error:
            raise PersistedWeightsError(f"{file}: {error}") from error

    def prune(self, keep: int) -> None:
        """Removes this rank's files of every version below, and what was left half written. Raises OSError."""
        for version in self._versions():
            if version < keep:
                self._remove(version)

    def _versions(self) -> list[int]:
        try:
            return sorted(int(entry.name) for entry in self.folder.iterdir() if entry.name.isdecimal())
        except OSError:
            return []

    def _is_whole(self, version: int) -> bool:
        try:
            return self._data(version).stat().st_size == self.describe(version).bytes
        except (OSError, PersistedWeightsError):
            return False

    def _remove(self, version: int) -> None:
        # What says that it is whole goes first.
        data = self._data(version)
        for file in (self._description(version), data, *data.parent.glob(f"rank-{self.rank}.*{_PARTIAL}")):
            file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            # Another rank's files may still be there.
            data.parent.rmdir()

    def _data(self, version: int) -> Path:
        return self.folder / str(version) / f"rank-{self.rank}.weights"

    def _description(self, version: int) -> Path:
        return self.folder / str(version) / f"rank-{self.rank}.json"


def _chunks(arena: Arena) -> Iterator[torch.Tensor]:
    """The arena's bytes in host memory, a part at a time; on CUDA copied on a stream of its own."""
    stream = torch.cuda.Stream(arena.device) if arena.device.type == "cuda" else None
    memory = arena.bytes
    for start in range(0, memory.numel(), CHUNK_BYTES):
        part = memory[start : start + CHUNK_BYTES]
        if stream is None:
            yield part
            continue
        with torch.cuda.stream(stream):
            yield part.cpu()


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[IO[bytes]]:
    """A new file that gets its name when all of it is on the disk. Another gang may write the same beside it."""
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}{_PARTIAL}")
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
