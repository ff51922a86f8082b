"""What a rank's supervisor holds of its weights, and says of them, before, during and after an update.

In shadow it holds a second set from before the commit until the engine has decided which of the two is served: the
death of this process, or of the engine, costs neither.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Protocol

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.keeper import held_manifest, manifest_of
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.digest import shard_digest
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

    def unload(self) -> int:
        """Drops the model, here and at the supervisor; returns how many bytes that frees."""
        ...


@dataclass(frozen=True, slots=True)
class _Replaced:
    """What a commit of a second set has replaced in the model, and what it would take to have it back."""

    plan: ArenaPlan
    arena: Arena
    version: int | None
    digest: int


class HeldWeights:
    """The weights in use, in the supervisor's memory and in files. Used by the computing thread."""

    def __init__(self, rank: int, arenas: ArenaClient, shard: Shard, persister: Persister) -> None:
        """persister: keeps what is committed in files."""
        self._first = ArenaId(rank, "weights", 0)
        self._second = ArenaId(rank, "weights", 1)
        self._arenas = arenas
        self._shard = shard
        self._persister = persister
        self._replaced: _Replaced | None = None

    @property
    def second(self) -> ArenaId:
        """Names the memory that mode shadow fills."""
        return self._second

    @property
    def undecided(self) -> bool:
        """Whether a second set was committed that may still be taken back."""
        return self._replaced is not None

    def keep(self, folder: str) -> None:
        """A model was loaded: what it is made of is kept in the folder ("": nowhere), where it is no checkpoint."""
        self._persister.choose(folder)
        loaded = self._shard.loaded
        if loaded is not None and loaded.weight_version:
            self._persister.keep(loaded.arena, manifest_of(self._arenas, loaded.arena))

    def find_persisted(self, folder: str, ok: pb.WeightUpdateOk) -> None:
        """Says which versions are in files, and which one is in memory."""
        files = self._persister.choose(folder)
        ok.persisted_versions.extend(files.versions() if files is not None else ())
        loaded = self._shard.loaded
        kept = loaded is not None and loaded.arena.id == self._first
        held = loaded.weight_version if loaded is not None and kept else self._whole_version(self._first)
        if held is not None:
            ok.held_version = held
        second = self._whole_version(self._second)
        if second is not None:
            ok.second_version = second

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
        manifest = manifest_of(self._arenas, loaded.arena)
        manifest.state = pb.ARENA_STATE_UPDATING
        self._arenas.update_manifest(manifest)
        self._shard.replace_weights(arena=target.arena, digest=0, version=None)

    def hold(self, loaded: LoadedModel, target: WeightTarget, digests: dict[str, int], version: int) -> None:
        """A second set is whole: whoever takes this process' place finds it beside the one in use."""
        manifest = manifest_of(self._arenas, loaded.arena)
        self._arenas.store(target.arena, completed_manifest(manifest, target.arena, digests, version=version))

    def withdraw(self) -> None:
        """A second set is given up, or about to change: nobody may find it any more. Idempotent."""
        self._arenas.release(self._second)

    def commit(self, loaded: LoadedModel, target: WeightTarget, digests: dict[str, int], version: int) -> None:
        """In place: the target's weights are whole again, under this version."""
        manifest = manifest_of(self._arenas, loaded.arena)
        self._arenas.update_manifest(completed_manifest(manifest, target.arena, digests, version=version))
        self._use(target.arena, digests, version)

    def exchange(self, loaded: LoadedModel, target: WeightTarget, digests: dict[str, int], version: int) -> None:
        """In shadow: the model has the set that is held as the second one. Until confirm, revert takes that back."""
        self._persister.cancel()
        self._replaced = _Replaced(target.plan, loaded.arena, loaded.weight_version, loaded.digest)
        bind_parameters(loaded.model, target.plan, target.arena)
        self._use(target.arena, digests, version)

    def confirm(self) -> None:
        """Every rank has committed: the weights before are given back, those in use are kept in files."""
        self._give_back_replaced()
        loaded = self._shard.loaded
        if loaded is not None:
            self._persister.keep(loaded.arena, manifest_of(self._arenas, loaded.arena))

    def revert(self) -> None:
        """The update is taken back: of two sets the first is in use, and the only one. Idempotent."""
        replaced, loaded = self._replaced, self._shard.loaded
        if replaced is not None and loaded is not None:
            committed = loaded.arena
            bind_parameters(loaded.model, replaced.plan, replaced.arena)
            self._shard.replace_weights(arena=replaced.arena, digest=replaced.digest, version=replaced.version)
            self._replaced = None
            _give_back(committed)
            manifest = manifest_of(self._arenas, replaced.arena)
            if manifest.state == pb.ARENA_STATE_COMPLETE:
                self._persister.keep(replaced.arena, manifest)
        self.withdraw()

    def decide(self, version: int | None) -> None:
        """A world is being built, and the engine has chosen: of two sets only that one stays. Idempotent.

        version: None, and one that is not here: the first. What it is worth is for load_model to check.
        """
        loaded = self._shard.loaded
        if self._replaced is not None and loaded is not None and loaded.weight_version == version:
            self._give_back_replaced()
        elif self._replaced is None and version is not None and self._is_only_second(version):
            # load_model maps and checks it, whether this process had a model or not.
            self._persister.cancel()
            self._shard.unload()
            self._arenas.move(self._second, self._first.number)
        else:
            self.revert()

    def drop(self) -> None:
        """The model is about to go, and with it every set."""
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            _give_back(replaced.arena)
            self._arenas.release(self._first)
        self.withdraw()

    def _is_only_second(self, version: int) -> bool:
        return self._whole_version(self._second) == version != self._whole_version(self._first)

    def _use(self, arena: Arena, digests: dict[str, int], version: int) -> None:
        self._shard.replace_weights(arena=arena, digest=shard_digest(digests), version=version)

    def _give_back_replaced(self) -> None:
        replaced, loaded = self._replaced, self._shard.loaded
        if replaced is None or loaded is None:
            return
        self._arenas.move(self._second, self._first.number)
        loaded.arena.id = self._first
        self._replaced = None
        _give_back(replaced.arena)

    def _whole_version(self, arena_id: ArenaId) -> int | None:
        manifest = held_manifest(self._arenas, arena_id)
        whole = manifest is not None and manifest.state == pb.ARENA_STATE_COMPLETE
        return manifest.weight_version if manifest is not None and whole else None


def _give_back(arena: Arena) -> None:
    """Parameters that were views of it are in cycles of modules."""
    gc.collect()
    arena.close()
