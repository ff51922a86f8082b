"""Arenas: the descriptors of the ranks' memory, held so that it outlives the rank processes."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.identity import ArenaId


class ArenaError(Exception):
    """What was asked about an arena cannot be done."""


@dataclass(slots=True)
class _HeldArena:
    manifest: worker_pb2.ArenaManifest
    descriptor: int


class MemoryHolder:
    """Keeps one descriptor and one manifest for each arena.

    The memory is freed once its descriptor is released here and no process maps it. Every method raises ArenaError
    for an id whose kind is unknown.
    """

    def __init__(self) -> None:
        self._arenas: dict[ArenaId, _HeldArena] = {}

    @property
    def manifests(self) -> list[worker_pb2.ArenaManifest]:
        """Of all arenas held, by rank, kind and number."""
        return [self._arenas[arena].manifest for arena in sorted(self._arenas)]

    def store(self, manifest: worker_pb2.ArenaManifest, descriptor: int) -> None:
        """Takes the descriptor over, in the place of one held under the same id.

        Raises:
            ArenaError: the memory is smaller than the manifest says. The descriptor is closed.
        """
        try:
            arena = read_id(manifest.id)
            _check_size(arena, manifest, descriptor)
        except ArenaError:
            os.close(descriptor)
            raise
        self.release(manifest.id)
        self._arenas[arena] = _HeldArena(manifest, descriptor)

    def fetch(self, arena: worker_pb2.ArenaId) -> tuple[worker_pb2.ArenaManifest, int] | None:
        """Manifest and descriptor (which stays the holder's); None where no such arena is held."""
        held = self._arenas.get(read_id(arena))
        return (held.manifest, held.descriptor) if held is not None else None

    def update(self, manifest: worker_pb2.ArenaManifest) -> None:
        """Replaces the manifest of an arena.

        Raises:
            ArenaError: the arena is not held, or its size would change.
        """
        arena = read_id(manifest.id)
        held = self._arenas.get(arena)
        if held is None:
            raise ArenaError(f"{arena} is not held here")
        if held.manifest.bytes != manifest.bytes:
            raise ArenaError(f"{arena} has {held.manifest.bytes} bytes; its new manifest says {manifest.bytes}")
        held.manifest = manifest

    def move(self, arena: worker_pb2.ArenaId, number: int) -> None:
        """Holds an arena under another number from now on, in the place of one that had it.

        Raises:
            ArenaError: the arena is not held.
        """
        source = read_id(arena)
        held = self._arenas.pop(source, None)
        if held is None:
            raise ArenaError(f"{source} is not held here")
        held.manifest.id.number = number
        self.release(held.manifest.id)
        self._arenas[read_id(held.manifest.id)] = held

    def release(self, arena: worker_pb2.ArenaId) -> int:
        """Closes the descriptor; how many bytes the arena has, 0 where it was not held."""
        held = self._arenas.pop(read_id(arena), None)
        if held is None:
            return 0
        os.close(held.descriptor)
        return held.manifest.bytes

    def close(self) -> None:
        """Releases everything. Idempotent."""
        while self._arenas:
            os.close(self._arenas.popitem()[1].descriptor)


def read_id(message: worker_pb2.ArenaId) -> ArenaId:
    """The id; ArenaError when its kind is unknown."""
    try:
        return ArenaId.from_proto(message)
    except ValueError as error:
        raise ArenaError(str(error)) from error


def _check_size(arena: ArenaId, manifest: worker_pb2.ArenaManifest, descriptor: int) -> None:
    status = os.fstat(descriptor)
    # A CUDA descriptor has no size. Touching a mapping beyond the end of a file would kill the process.
    if stat.S_ISREG(status.st_mode) and status.st_size < manifest.bytes:
        raise ArenaError(f"{arena}: the memory has {status.st_size} bytes, its manifest says {manifest.bytes}")
