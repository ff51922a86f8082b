"""The two phases at the end of an update, and what is left of them where only some ranks take the second one."""

from __future__ import annotations

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


def prepared(ranks: list[Rank], weights: Weights, *, shadow: bool) -> Trainer:
    """All ranks have the set, and its digests."""
    trainer = Trainer(ranks)
    trainer.begin(shadow=shadow)
    trainer.send(weights)
    for rank in ranks:
        rank.step(prepare=pb.PrepareCommit())
    return trainer


def check_old(world: World, rank: Rank, old: Weights, version: int) -> None:
    assert rank.version == version
    assert all(torch.equal(tensor, old[name]) for name, tensor in rank.parameters().items())
    manifest = world.manifest(rank.rank)
    assert (manifest.state, manifest.weight_version) == (pb.ARENA_STATE_COMPLETE, version)


def open_arenas() -> int:
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


@pytest.mark.parametrize("shadow", [False, True], ids=["in_place", "shadow"])
def test_an_engine_that_dies_between_the_phases_leaves_the_old_version_or_none(world: World, shadow: bool) -> None:
    """E46, U35: the next one finds nothing in between."""
    ranks = world.ranks(2)
    before = [rank.parameters() for rank in ranks]
    prepared(ranks, world.new_weights(), shadow=shadow)
    arenas = open_arenas()
    for rank in ranks:
        rank.updates.leave("the session has ended")
    # Second arenas are given back: of each its descriptor and the mapping's own one.
    assert arenas - open_arenas() == (2 * len(ranks) if shadow else 0)
    if shadow:
        for rank, old in zip(ranks, before, strict=True):
            check_old(world, rank, old, 0)
    else:
        assert [rank.version for rank in world.ranks(2)] == [None, None]


def test_an_engine_that_dies_within_the_second_phase_leaves_versions_that_differ(world: World) -> None:
    """U35: the next one sees that, and serves neither."""
    ranks = world.ranks(2)
    prepared(ranks, world.new_weights(), shadow=True)
    ranks[0].step(commit=pb.CommitUpdate(version=4))
    for rank in ranks:
        rank.updates.leave("the session has ended")
    assert [rank.version for rank in ranks] == [4, 0]
    assert [rank.version for rank in world.ranks(2)] == [4, 0]


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
