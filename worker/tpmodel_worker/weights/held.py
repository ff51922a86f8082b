"""What a rank's supervisor holds of its weights, and says of them, before, during and after an update."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Protocol

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.load import LoadedModel, completed_manifest
from tpmodel_worker.loading.plan import ArenaPlan, bind_parameters
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.target import WeightTarget


class Shard(Protocol):
    """Where the model of this rank is."""

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if there is one."""
        ...

    def replace_weights(self, *, arena: Arena, digest: int, version: int | None) -> None:
        """Notes which arena holds the model's weights now, and what they are."""
        ...


@dataclass(frozen=True, slots=True)
class _Replaced:
    """What a commit of a second arena has replaced, and what it would take to have it back."""

    plan: ArenaPlan
    arena: Arena
    manifest: pb.ArenaManifest
    digest: int


class HeldWeights:
    """The weights in use, in the supervisor's memory and in files. Used by the computing thread."""

    def __init__(self, rank: int, arenas: ArenaClient, shard: Shard, persister: Persister) -> None:
        """persister: keeps what is committed in files."""
        self._rank = rank
        self._arenas = arenas
        self._shard = shard
        self._persister = persister
        self._replaced: _Replaced | None = None

    def keep(self, folder: str) -> None:
        """A model was loaded: what it is made of is kept in the folder ("": nowhere), where it is no checkpoint."""
        self._persister.choose(folder)
        loaded = self._shard.loaded
        if loaded is not None and loaded.weight_version:
            self._persister.keep(loaded.arena, self._manifest(loaded))

    def find_persisted(self, folder: str, ok: pb.WeightUpdateOk) -> None:
        """Says which versions are in files, and which one is in memory."""
        files = self._persister.choose(folder)
        ok.persisted_versions.extend(files.versions() if files is not None else ())
        loaded = self._shard.loaded
        if loaded is not None:
            held = loaded.weight_version
        else:
            manifest = self._held_manifest(ArenaId(self._rank, "weights", 0))
            complete = manifest is not None and manifest.state == pb.ARENA_STATE_COMPLETE
            held = manifest.weight_version if manifest is not None and complete else None
        if held is not None:
            ok.held_version = held

    def prune(self, keep: int) -> None:
        """Removes older versions from the files."""
        self._persister.prune(keep)

    def stop_writing(self) -> None:
        """What is being written is given up: the weights are about to change, or to go."""
        self._persister.cancel()

    def mark_updating(self, loaded: LoadedModel, target: WeightTarget) -> None:
        """The weights in use are about to be overwritten: nothing may map them until the commit."""
        self._persister.cancel()
        if loaded.weight_version is None:
            return
        manifest = self._manifest(loaded)
        manifest.state = pb.ARENA_STATE_UPDATING
        self._arenas.update_manifest(manifest)
        self._shard.replace_weights(arena=target.arena, digest=0, version=None)

    def commit(
        self, loaded: LoadedModel, target: WeightTarget, digests: dict[str, int], *, shadow: bool, version: int
    ) -> None:
        """The target's weights are the ones in use from now on, under this version.

        Until confirm, revert takes back what shadow has replaced.
        """
        manifest, arena = self._manifest(loaded), target.arena
        self._persister.cancel()
        if shadow:
            arena.id = loaded.arena.id
        committed = completed_manifest(manifest, arena, digests, version=version)
        digest = sum(digests.values()) % (1 << 64)
        if shadow:
            self._arenas.store(arena, committed)
            self._replaced = _Replaced(target.plan, loaded.arena, manifest, loaded.digest)
            bind_parameters(loaded.model, target.plan, arena)
        else:
            self._arenas.update_manifest(committed)
        self._shard.replace_weights(arena=arena, digest=digest, version=version)

    def confirm(self) -> None:
        """Every rank has committed: the weights before are given back, those in use are kept in files."""
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            _give_back(replaced.arena)
        loaded = self._shard.loaded
        if loaded is not None:
            self._persister.keep(loaded.arena, self._manifest(loaded))

    def revert(self) -> None:
        """Another rank could not commit: the weights before are in use again, if still there. Idempotent."""
        replaced, loaded = self._replaced, self._shard.loaded
        if replaced is None or loaded is None:
            return
        before, committed = replaced.arena, loaded.arena
        self._arenas.store(before, replaced.manifest)
        bind_parameters(loaded.model, replaced.plan, before)
        self._shard.replace_weights(arena=before, digest=replaced.digest, version=replaced.manifest.weight_version)
        self._replaced = None
        _give_back(committed)
        self._persister.keep(before, replaced.manifest)

    def settle(self) -> None:
        """Nobody is left to confirm or take back: what was committed stays. Idempotent."""
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            _give_back(replaced.arena)

    def _held_manifest(self, arena_id: ArenaId) -> pb.ArenaManifest | None:
        held = self._arenas.fetch(arena_id)
        if held is None:
            return None
        descriptor, manifest = held
        os.close(descriptor)
        return manifest

    def _manifest(self, loaded: LoadedModel) -> pb.ArenaManifest:
        manifest = self._held_manifest(loaded.arena.id)
        if manifest is None:
            raise ArenaError(f"{loaded.arena.id} is not held by the supervisor any more")
        return manifest


def _give_back(arena: Arena) -> None:
    """Parameters that were views of it are in cycles of modules."""
    gc.collect()
    arena.close()
