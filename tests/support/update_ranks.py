"""Ranks with their arenas and their part of weight updates, without an engine."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support.checkpoints import make_checkpoint
from support.lockstep import LockstepWorld
from support.rank_link import RankLink, open_rank_link
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files
from tpmodel_worker.loading.load import LoadedModel, PersistedShard, load_model
from tpmodel_worker.loading.persisted import ShardFiles
from tpmodel_worker.models.config import read_model_config
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.updates import WeightUpdates

CPU = torch.device("cpu")
HOST = "127.0.0.1"
KEY = "secret"
Weights = Mapping[str, torch.Tensor]


class Rank:
    """One rank: its shard, its arenas, its updates. May be made again over the same arenas."""

    def __init__(
        self,
        checkpoint: Path,
        arenas: ArenaClient,
        rank: int,
        world_size: int,
        persisted: PersistedShard | None = None,
        version: int | None = None,
    ) -> None:
        """version: of the set in memory that the engine has chosen."""
        self.rank = rank
        self.checkpoint = checkpoint
        self.arenas = arenas
        self.world_size = world_size
        self.status = pb.WeightUpdateStatus()
        self.persisted = pb.PersistStatus()
        self.loaded: LoadedModel | None = None
        self.updates = WeightUpdates(
            rank=rank,
            device=CPU,
            arenas=arenas,
            shard=self,
            address=HOST,
            report=lambda status: setattr(self, "status", status),
            persister=Persister(rank, lambda status: setattr(self, "persisted", status)),
        )
        with torch.inference_mode():
            if version is not None:
                self.updates.decide(pb.LoadDenseShardRequest(held_version=version))
            self.loaded = self._load(arenas, rank, world_size, persisted)

    def _load(self, arenas: ArenaClient, rank: int, world_size: int, persisted: PersistedShard | None) -> LoadedModel:
        return load_model(
            read_model_config(self.checkpoint, world_size=world_size),
            rank=rank,
            world_size=world_size,
            communicator=LockstepWorld(world_size).communicators[rank],
            device=CPU,
            dtype=torch.float32,
            load_format="safetensors",
            paths=list_checkpoint_files(self.checkpoint),
            dummy_seed=0,
            arenas=arenas,
            model_id="m",
            progress=lambda what, done, total: None,
            persisted=persisted,
        )

    def replace_weights(self, *, arena: Arena, digest: int, version: int | None) -> None:
        """As the rank's shard does."""
        assert self.loaded is not None
        self.loaded = replace(self.loaded, arena=arena, digest=digest, weight_version=version)

    def unload(self) -> int:
        """As the rank's shard does."""
        loaded, self.loaded = self.loaded, None
        if loaded is None:
            return 0
        arena = loaded.arena
        size = arena.size
        del loaded
        gc.collect()
        arena.close()
        self.arenas.release(arena.id)
        return size

    def load_again(self, version: int | None) -> None:
        """A new world: what is in memory is kept, of two sets the one that the engine has chosen."""
        self.updates.leave("the epoch ends")
        with torch.inference_mode():
            self.updates.decide(pb.LoadDenseShardRequest(held_version=version))
            self.loaded = self.loaded or self._load(self.arenas, self.rank, self.world_size, None)

    def step(self, **step: object) -> pb.WeightUpdateOk:
        """Executes one step in the mode of the computing thread."""
        with torch.inference_mode():
            return self.updates.execute(pb.WeightUpdateRequest(**step))  # type: ignore[arg-type]

    @property
    def version(self) -> int | None:
        assert self.loaded is not None
        return self.loaded.weight_version

    def parameters(self) -> dict[str, torch.Tensor]:
        assert self.loaded is not None
        return {name: parameter.clone() for name, parameter in self.loaded.model.named_parameters()}


class World:
    """Ranks over one supervisor's memory."""

    def __init__(self, folder: Path, arenas: ArenaClient, holder: RankLink) -> None:
        self.folder = folder
        self.arenas = arenas
        self.holder = holder
        self._ranks: list[Rank] = []

    def close(self) -> None:
        """Every rank leaves the group that it is in: nothing of Gloo's runs on beside the next test."""
        for rank in self._ranks:
            rank.updates.leave("the test is over")

    def ranks(self, world_size: int, **checkpoint: Any) -> list[Rank]:
        """Loads the checkpoint, or maps what is held first."""
        path = self.folder / "checkpoint"
        if not path.exists():
            checkpoint.setdefault("seed", 1)
            make_checkpoint(path, **checkpoint)
        return [self._keep(Rank(path, self.arenas, rank, world_size)) for rank in range(world_size)]

    def made_again(self, rank: Rank, version: int) -> Rank:
        """A process in the place of one that has died, for a world that is to serve this version."""
        return Rank(rank.checkpoint, self.arenas, rank.rank, rank.world_size, version=version)

    def rank(self, *, persisted: ShardFiles, version: int) -> Rank:
        """The only rank of its world, out of a file."""
        return self._keep(Rank(self.folder / "checkpoint", self.arenas, 0, 1, PersistedShard(persisted, version)))

    def loaded_elsewhere(self, weights: Weights, world_size: int) -> list[dict[str, torch.Tensor]]:
        """What ranks have that load these weights from a checkpoint."""
        from safetensors.torch import save_file

        path = self.folder / "expected"
        path.mkdir()
        (path / "config.json").write_bytes((self.folder / "checkpoint" / "config.json").read_bytes())
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path / "model.safetensors")
        with open_rank_link() as holder, ArenaClient(holder.path) as arenas:
            return [Rank(path, arenas, rank, world_size).parameters() for rank in range(world_size)]

    def sets(self, rank: int) -> dict[int, int]:
        """Versions of the whole sets of weights that are held for a rank, by their number."""
        return {
            arena.number: manifest.weight_version
            for arena, (_, manifest) in self.holder.arenas.items()
            if (arena.rank, arena.kind) == (rank, "weights") and manifest.state == pb.ARENA_STATE_COMPLETE
        }

    def manifest(self, rank: int) -> pb.ArenaManifest:
        return self.holder.arenas[ArenaId(rank, "weights", 0)][1]

    def _keep(self, rank: Rank) -> Rank:
        self._ranks.append(rank)
        return rank

    def checkpoint(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "checkpoint" / "model.safetensors")

    def new_weights(self, seed: int = 0) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(tensor.shape, generator=generator) for name, tensor in self.checkpoint().items()}


@contextlib.contextmanager
def open_world(folder: Path) -> Iterator[World]:
    """A supervisor's memory for as long as the block lasts."""
    with open_rank_link() as holder, ArenaClient(holder.path) as arenas:
        with contextlib.closing(World(folder, arenas, holder)) as world:
            yield world


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        call()
    return caught.value.kind, str(caught.value)
