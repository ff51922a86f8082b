"""Who holds arenas beside the process that made them."""

from __future__ import annotations

import os
from typing import Protocol

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena


class ArenaKeeper(Protocol):
    """The supervisor, as a rank's memory sees it. Every call raises ArenaLinkError when that refuses or is gone."""

    def store(self, arena: Arena, manifest: worker_pb2.ArenaManifest) -> None:
        """Hands over a copy of the arena's descriptor."""
        ...

    def fetch(self, arena_id: ArenaId) -> tuple[int, worker_pb2.ArenaManifest] | None:
        """A descriptor, which the caller then owns, and the manifest; None when there is no such arena."""
        ...

    def update_manifest(self, manifest: worker_pb2.ArenaManifest) -> None:
        """Replaces the stored manifest of an arena."""
        ...

    def release(self, arena_id: ArenaId) -> None:
        """Lets go of an arena, whether or not there is one."""
        ...


def held_manifest(keeper: ArenaKeeper, arena_id: ArenaId) -> worker_pb2.ArenaManifest | None:
    """What is said of an arena; None when there is no such arena. Raises ArenaLinkError."""
    held = keeper.fetch(arena_id)
    if held is None:
        return None
    descriptor, manifest = held
    os.close(descriptor)
    return manifest


def manifest_of(keeper: ArenaKeeper, arena: Arena) -> worker_pb2.ArenaManifest:
    """What is said of an arena that this process has stored or mapped. Raises ArenaError where it is not held."""
    manifest = held_manifest(keeper, arena.id)
    if manifest is None:
        raise ArenaError(f"{arena.id} is not held by the supervisor any more")
    return manifest


class NoKeeper:
    """For memory that nobody is to find later: it goes with the process, or when it is closed."""

    def store(self, arena: Arena, manifest: worker_pb2.ArenaManifest) -> None:
        """Nobody takes it."""

    def fetch(self, arena_id: ArenaId) -> tuple[int, worker_pb2.ArenaManifest] | None:
        """There is none."""
        return None

    def update_manifest(self, manifest: worker_pb2.ArenaManifest) -> None:
        """There is none."""

    def release(self, arena_id: ArenaId) -> None:
        """There is none."""
