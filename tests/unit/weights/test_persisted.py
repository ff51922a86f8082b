"""Committed weights in files: written beside serving, read by ranks that have nothing in memory."""

from __future__ import annotations

import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.update_ranks import CPU, Rank, World, open_world
from support.waiting import until
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.load import completed_manifest, digest_tensors
from tpmodel_worker.loading.persisted import PersistedWeightsError, ShardFiles, WritingCancelledError
from tpmodel_worker.loading.plan import plan_weights

SIZE = 40 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena.create(ArenaId(0, "weights", 0), SIZE, CPU)
    arena.bytes.copy_(torch.randint(256, (arena.size,), dtype=torch.uint8))
    yield arena
    arena.close()


def manifest(arena: Arena, version: int) -> pb.ArenaManifest:
    return pb.ArenaManifest(bytes=arena.size, state=pb.ARENA_STATE_COMPLETE, weight_version=version, layout_hash="l")


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path: Path, arena: Arena) -> None:
        files = ShardFiles(tmp_path, 3)
        for version in (2, 10):
            files.write(arena, manifest(arena, version), threading.Event())
        assert files.versions() == [2, 10]
        assert names(tmp_path / "10") == ["rank-3.json", "rank-3.weights"]
        assert files.describe(10).layout_hash == "l"
        target = torch.zeros(arena.size, dtype=torch.uint8)
        files.read(10, target, lambda _done, _total: None)
        assert torch.equal(target, arena.bytes)

    def test_older_versions_are_removed_and_other_ranks_files_stay(self, tmp_path: Path, arena: Arena) -> None:
        for rank in (0, 1):
            for version in (1, 2, 3):
                ShardFiles(tmp_path, rank).write(arena, manifest(arena, version), threading.Event())
        ShardFiles(tmp_path, 0).prune(3)
        assert ShardFiles(tmp_path, 0).versions() == [3]
        assert ShardFiles(tmp_path, 1).versions() == [1, 2, 3]
        ShardFiles(tmp_path, 1).prune(3)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["3"]

    def test_a_version_counts_once_all_of_it_is_there(self, tmp_path: Path, arena: Arena) -> None:
        files = ShardFiles(tmp_path, 0)
        files.write(arena, manifest(arena, 1), threading.Event())
        data, description = tmp_path / "1" / "rank-0.weights", tmp_path / "1" / "rank-0.json"
        text = description.read_text()
        description.unlink()
        assert files.versions() == []
        description.write_text(text[: len(text) // 2])
        assert files.versions() == []
        with pytest.raises(PersistedWeightsError, match=r"rank-0\.json"):
            files.describe(1)
        description.write_text(text)
        with data.open("r+b") as stream:
            stream.truncate(1000)
        assert files.versions() == []
        with pytest.raises(PersistedWeightsError, match="ends before byte"):
            files.read(1, torch.zeros(arena.size, dtype=torch.uint8), lambda _done, _total: None)

    def test_a_disk_that_takes_no_more_is_an_error_and_leaves_nothing(self, tmp_path: Path, arena: Arena) -> None:
        files = ShardFiles(tmp_path, 0)
        files.write(arena, manifest(arena, 1), threading.Event())
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                files.write(arena, manifest(arena, 2), threading.Event())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert names(tmp_path) == ["1/rank-0.json", "1/rank-0.weights"]

    def test_writing_ends_when_newer_weights_come(self, tmp_path: Path, arena: Arena) -> None:
        cancelled = threading.Event()
        cancelled.set()
        with pytest.raises(WritingCancelledError):
            ShardFiles(tmp_path, 0).write(arena, manifest(arena, 1), cancelled)
        assert names(tmp_path) == []


class TestRanks:
    """A rank whose memory is gone, with the files that its predecessor has left."""

    def persist(self, world: World, folder: Path, version: int) -> Rank:
        """A rank that commits weights of its own and has them in its file."""
        (rank,) = world.ranks(1)
        assert rank.loaded is not None
        rank.updates.keep(str(folder))
        manifest = world.manifest(0)
        rank.loaded.arena.bytes[: rank.loaded.bytes].view(torch.float32).mul_(0.5)
        digests = digest_tensors(plan_weights(rank.loaded.model), rank.loaded.arena, lambda *_: None)
        world.arenas.update_manifest(completed_manifest(manifest, rank.loaded.arena, digests, version=version))
        rank.replace_weights(arena=rank.loaded.arena, digest=0, version=version)
        rank.updates.keep(str(folder))
        until(lambda: rank.persisted.version == version, "the file is written")
        return rank

    def test_it_loads_the_version_with_its_digests_instead_of_the_checkpoint(
        self, world: World, tmp_path: Path
    ) -> None:
        """E46."""
        before = self.persist(world, tmp_path / "kept", 4).parameters()
        with open_world(world.folder) as other:
            again = other.rank(persisted=ShardFiles(tmp_path / "kept", 0), version=4)
            assert again.version == 4
            assert other.manifest(0).weight_version == 4
            for name, parameter in again.parameters().items():
                assert torch.equal(parameter, before[name]), name

    def test_a_changed_bit_is_refused_by_its_digest(self, world: World, tmp_path: Path) -> None:
        """E46: never in silence, and nothing stays in memory."""
        self.persist(world, tmp_path / "kept", 4)
        data = tmp_path / "kept" / "4" / "rank-0.weights"
        content = bytearray(data.read_bytes())
        content[1000] ^= 1
        data.write_bytes(content)
        with open_world(world.folder) as other:
            with pytest.raises(PersistedWeightsError, match="is not what was written"):
                other.rank(persisted=ShardFiles(tmp_path / "kept", 0), version=4)
            assert not other.holder.arenas

    def test_a_rank_says_what_it_could_load(self, world: World, tmp_path: Path) -> None:
        rank = self.persist(world, tmp_path / "kept", 4)
        reply = rank.step(find_persisted=pb.FindPersisted(folder=str(tmp_path / "kept")))
        assert (list(reply.persisted_versions), reply.held_version) == ([4], 4)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world
