"""The two phases at the end of an update, and what is left of them where only some ranks take the second one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.update_ranks import Rank, Weights, World, open_world, refusal
from support.update_trainer import Trainer
from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.weights.member import Rehearsal


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world


def prepared(ranks: list[Rank], weights: Weights, *, shadow: bool, version: int = 4) -> Trainer:
    """All ranks have the set, and its digests."""
    trainer = Trainer(ranks)
    trainer.begin(shadow=shadow)
    trainer.send(weights)
    for rank in ranks:
        rank.step(prepare=pb.PrepareCommit(version=version))
    return trainer


def check_old(world: World, rank: Rank, old: Weights, version: int) -> None:
    assert rank.version == version
    assert all(torch.equal(tensor, old[name]) for name, tensor in rank.parameters().items())
    manifest = world.manifest(rank.rank)
    assert (manifest.state, manifest.weight_version) == (pb.ARENA_STATE_COMPLETE, version)


def open_arenas() -> int:
    gc.collect()  # mappings of models that are gone
    return sum("memfd:" in str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_a_second_arena_that_not_every_rank_could_commit_is_taken_back(world: World) -> None:
    """E46, U35: in shadow a failure changes nothing; the next update begins where this one did."""
    ranks = world.ranks(2)
    before = [rank.parameters() for rank in ranks]
    prepared(ranks, world.new_weights(), shadow=True)
    ranks[0].step(commit=pb.CommitUpdate(version=4))
    assert ranks[0].version == 4
    for rank in ranks:
        rank.step(abort=pb.AbortWeightUpdate(reason="rank 1 could not commit"))
    for rank, old in zip(ranks, before, strict=True):
        check_old(world, rank, old, 0)
    # What the supervisors hold is checked by whoever maps it.
    assert [rank.version for rank in world.ranks(2)] == [0, 0]
    prepared(ranks, world.new_weights(1), shadow=True).commit(4)
    assert [rank.version for rank in ranks] == [4, 4]


def test_what_every_rank_has_committed_is_not_taken_back(world: World) -> None:
    (rank,) = world.ranks(1)
    prepared([rank], world.new_weights(), shadow=True).commit(4)
    rank.step(abort=pb.AbortWeightUpdate(reason="the trainer leaves"))
    assert rank.version == 4


def test_an_engine_that_dies_between_the_phases_leaves_no_weights_in_place(world: World) -> None:
    """E46, U35: the next one finds nothing in between."""
    ranks = world.ranks(2)
    prepared(ranks, world.new_weights(), shadow=False)
    for rank in ranks:
        rank.updates.leave("the session has ended")
    assert [rank.version for rank in world.ranks(2)] == [None, None]


def commit_on(ranks: list[Rank], *, confirmed: int = 0) -> None:
    for rank in ranks:
        rank.step(commit=pb.CommitUpdate(version=4))
    for rank in ranks[:confirmed]:
        rank.step(confirm=pb.ConfirmCommit())


class TestTwoSets:
    """E46, U35: in shadow the supervisors hold both sets until the engine has decided, whoever dies."""

    def found(self, rank: Rank) -> tuple[int | None, int | None]:
        """What it tells an engine that asks."""
        reply = rank.step(find_persisted=pb.FindPersisted())
        return (
            reply.held_version if reply.HasField("held_version") else None,
            reply.second_version if reply.HasField("second_version") else None,
        )

    def check(self, world: World, rank: Rank, wanted: Weights, version: int) -> None:
        """The rank has the set, and its supervisor nothing else."""
        assert rank.version == version
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in rank.parameters().items())
        assert world.sets(rank.rank) == {0: version}
        assert self.found(rank) == (version, None)
        assert rank.loaded is not None
        assert sum(entry.digest for entry in world.manifest(rank.rank).digests) % (1 << 64) == rank.loaded.digest

    def undecided(
        self, world: World, *, committed: int, version: int
    ) -> tuple[list[Rank], list[dict[str, torch.Tensor]]]:
        """Two ranks with both sets, of which so many have taken the new one; what each is to have with a version."""
        ranks = world.ranks(2)
        expected = self.expected(world, ranks, version)
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks[:committed])
        return ranks, expected

    def expected(self, world: World, ranks: list[Rank], version: int) -> list[dict[str, torch.Tensor]]:
        return world.loaded_elsewhere(world.new_weights() if version else world.checkpoint(), len(ranks))

    def check_next_update(self, ranks: list[Rank], world: World) -> None:
        prepared(ranks, world.new_weights(1), shadow=True, version=5).commit(5)
        assert [rank.version for rank in ranks] == [5] * len(ranks)
        assert [world.sets(rank.rank) for rank in ranks] == [{0: 5}] * len(ranks)

    @pytest.mark.parametrize("version", [0, 4])
    @pytest.mark.parametrize("committed", [0, 1, 2])
    def test_ranks_that_live_serve_whichever_the_engine_chooses(
        self, world: World, committed: int, version: int
    ) -> None:
        """Whether they had taken the new one or not."""
        ranks, expected = self.undecided(world, committed=committed, version=version)
        assert [self.found(rank) for rank in ranks] == [(0, 4), (0, 4)]
        arenas = open_arenas()
        for rank in ranks:
            rank.load_again(version)
        for rank, wanted in zip(ranks, expected, strict=True):
            self.check(world, rank, wanted, version)
        # Of the second sets the descriptors here, those of the mappings and the supervisors' ones.
        assert arenas - open_arenas() == 3 * len(ranks)
        self.check_next_update(ranks, world)

    @pytest.mark.parametrize("version", [0, 4])
    @pytest.mark.parametrize("committed", [0, 1, 2])
    def test_ranks_that_are_made_again_map_whichever_the_engine_chooses(
        self, world: World, committed: int, version: int
    ) -> None:
        ranks, expected = self.undecided(world, committed=committed, version=version)
        for rank, wanted in zip(ranks, expected, strict=True):
            again = world.made_again(rank, version)
            assert again.loaded is not None
            assert again.loaded.mapped
            self.check(world, again, wanted, version)

    def test_once_confirmed_there_is_one_set(self, world: World) -> None:
        (rank,) = ranks = world.ranks(1)
        before = open_arenas()
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks, confirmed=1)
        assert open_arenas() == before
        self.check(world, rank, self.expected(world, ranks, 4)[0], 4)

    def test_a_rank_that_dies_before_it_confirms_follows_one_that_has(self, world: World) -> None:
        ranks = world.ranks(2)
        expected = self.expected(world, ranks, 4)
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks, confirmed=1)
        assert [self.found(rank) for rank in ranks] == [(4, None), (0, 4)]
        self.check(world, world.made_again(ranks[1], 4), expected[1], 4)

    def test_an_aborted_commit_leaves_one_set(self, world: World) -> None:
        ranks = world.ranks(2)
        before = open_arenas()
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks[:1])
        for rank in ranks:
            rank.step(abort=pb.AbortWeightUpdate(reason="rank 1 could not commit"))
        assert open_arenas() == before
        assert [world.sets(rank.rank) for rank in ranks] == [{0: 0}] * 2
        self.check_next_update(ranks, world)

    def test_a_set_that_is_changed_after_it_was_prepared_is_not_held_as_whole(self, world: World) -> None:
        (rank,) = ranks = world.ranks(1)
        trainer = prepared(ranks, world.new_weights(), shadow=True)
        assert self.found(rank) == (0, 4)
        name, tensor = next(iter(world.new_weights(1).items()))
        trainer.send({name: tensor})
        assert self.found(rank) == (0, None)
        trainer.commit(5)
        assert world.sets(0) == {0: 5}

    def test_a_set_of_which_a_bit_has_changed_is_never_used(self, world: World) -> None:
        """Its digest says so, and the checkpoint's version tells the engine."""
        ranks = world.ranks(1)
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks)
        assert ranks[0].loaded is not None
        with torch.inference_mode():
            ranks[0].loaded.arena.bytes[100] ^= 1
        again = world.made_again(ranks[0], 4)
        assert again.loaded is not None
        assert (again.loaded.mapped, again.version) == (False, 0)
        assert world.sets(0) == {0: 0}

    def test_an_unloaded_model_leaves_none(self, world: World) -> None:
        ranks = world.ranks(1)
        prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks)
        ranks[0].updates.unload()
        ranks[0].unload()
        assert not world.holder.arenas

    def test_no_other_version_is_committed_than_was_prepared(self, world: World) -> None:
        ranks = world.ranks(1)
        prepared(ranks, world.new_weights(), shadow=True)
        kind, message = refusal(lambda: ranks[0].step(commit=pb.CommitUpdate(version=5)))
        assert (kind, "prepared as version 4" in message) == (pb.ERROR_KIND_UPDATE_ORDER, True)

    def test_no_update_begins_before_a_commit_is_decided(self, world: World) -> None:
        ranks = world.ranks(1)
        trainer = prepared(ranks, world.new_weights(), shadow=True)
        commit_on(ranks)
        kind, message = refusal(lambda: trainer.begin(shadow=True))
        assert (kind, "neither confirmed nor aborted" in message) == (pb.ERROR_KIND_UPDATE_ORDER, True)


class TestRehearsal:
    """What an update will do is done once when the group is joined."""

    @pytest.mark.parametrize("rehearsal", [Rehearsal(50_000, 2, "float32"), Rehearsal(3, 1, "bfloat16")])
    def test_it_changes_nothing_and_an_update_follows(self, world: World, rehearsal: Rehearsal) -> None:
        ranks = world.ranks(2)
        before = [rank.parameters() for rank in ranks]
        trainer = Trainer(ranks, rehearsal=rehearsal)
        assert trainer.wait() == ["", ""]
        for rank, old in zip(ranks, before, strict=True):
            check_old(world, rank, old, 0)
        trainer.begin()
        trainer.send(world.new_weights())
        trainer.commit(1)
        assert [rank.version for rank in ranks] == [1, 1]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"buffer_bytes": 0}, "2 buffers of 0 bytes"),
            ({"buffer_count": 17}, "17 buffers of 10 bytes: 1 to 16"),
            ({"dtype": "int8"}, "dtype 'int8': expected one of float64"),
        ],
    )
    def test_one_that_cannot_be_is_refused(self, world: World, changes: dict[str, object], message: str) -> None:
        (rank,) = world.ranks(1)
        fields = {"buffer_bytes": 10, "buffer_count": 2, "dtype": "float32"} | changes
        join = pb.JoinUpdate(rehearsal=weights_pb2.UpdateRehearsal(**fields))  # type: ignore[arg-type]
        kind, text = refusal(lambda: rank.step(join=join))
        assert kind == pb.ERROR_KIND_INVALID_ARGUMENT
        assert message in text
