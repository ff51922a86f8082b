"""A rank's part of an update: real arenas, a real group with a trainer, no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.update_ranks import Weights, World, open_world, refusal
from support.update_trainer import Trainer
from support.waiting import until
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas import host as host_memory
from tpmodel_worker.arenas.errors import ArenaMemoryError
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.weights.packing import describe, write_update


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layout", [{}, {"packed": False}, {"buffer_size": 1 << 30}], ids=["packed", "unpacked", "one"])
@pytest.mark.parametrize("variant", [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 1, "vocab_size": 523}])
def test_ranks_have_what_loading_the_same_weights_gives(
    world: World, world_size: int, layout: dict[str, object], variant: dict[str, object]
) -> None:
    """E39, E40: fused and split tensors by the map of loading, padding rows untouched; the manifest says so."""
    ranks = world.ranks(world_size, **variant)
    weights = world.new_weights()
    trainer = Trainer(ranks)
    trainer.begin()
    trainer.send(weights, **layout)
    assert [rank.version for rank in ranks] == [None] * world_size
    trainer.commit(3)
    expected = world.loaded_elsewhere(weights, world_size)
    for rank, wanted in zip(ranks, expected, strict=True):
        assert rank.version == 3
        for name, parameter in rank.parameters().items():
            assert torch.equal(parameter, wanted[name]), name
        manifest = world.manifest(rank.rank)
        assert (manifest.state, manifest.weight_version) == (pb.ARENA_STATE_COMPLETE, 3)
        assert sum(entry.digest for entry in manifest.digests) % (1 << 64) == rank.loaded.digest  # type: ignore[union-attr]


def test_a_rank_that_is_made_again_has_the_updated_weights(world: World) -> None:
    """U35, E46: mapped out of the arena at the version, digests checked."""
    trainer = Trainer(world.ranks(2))
    trainer.begin()
    trainer.send(world.new_weights())
    trainer.commit(5)
    before = trainer.ranks[1].parameters()
    (again,) = [rank for rank in world.ranks(2) if rank.rank == 1]
    assert again.loaded is not None
    assert (again.loaded.mapped, again.version) == (True, 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.parameters().items())


def test_tied_and_lower_precision_tensors_are_taken(world: World) -> None:
    ranks = world.ranks(1, tie_word_embeddings=True)
    weights = {name: tensor.bfloat16() for name, tensor in world.new_weights().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    (described,) = [info for info in ranks[0].step(describe=pb.DescribeWeights()).parameters if info.tied]
    assert described.name == "lm_head.weight"
    trainer = Trainer(ranks)
    trainer.begin()
    trainer.send(weights)
    trainer.commit(1)
    embedding = ranks[0].parameters()["model.embed_tokens.weight"]
    assert torch.equal(embedding[:512], weights["model.embed_tokens.weight"].float())


class TestOrder:
    """E38, E45."""

    def test_steps_before_the_group_is_joined_are_refused(self, world: World) -> None:
        (rank,) = world.ranks(1)
        for step in (
            {"begin": pb.BeginUpdate()},
            {"receive": pb.ReceiveWeights()},
            {"prepare": pb.PrepareCommit()},
            {"commit": pb.CommitUpdate(version=1)},
        ):
            kind, message = refusal(lambda step=step: rank.step(**step))
            assert kind == pb.ERROR_KIND_UPDATE_ORDER
            assert "init comes first" in message
        assert rank.version == 0

    def test_steps_that_are_not_due_are_refused_and_change_nothing(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = Trainer([rank])
        for step in ({"prepare": pb.PrepareCommit()}, {"commit": pb.CommitUpdate(version=1)}):
            assert "no update was started" in refusal(lambda step=step: rank.step(**step))[1]
        trainer.begin()
        assert "an update is under way" in refusal(trainer.begin)[1]
        assert "not prepared" in refusal(lambda: rank.step(commit=pb.CommitUpdate(version=1)))[1]
        assert "not checked" in refusal(lambda: rank.step(receive=pb.ReceiveWeights()))[1]
        assert rank.version == 0
        assert world.manifest(0).state == pb.ARENA_STATE_COMPLETE

    def test_a_set_that_is_not_full_is_not_committed_and_can_be_completed(self, world: World) -> None:
        """E46, U35."""
        (rank,) = world.ranks(1)
        trainer = Trainer([rank])
        weights = world.new_weights()
        missing = "model.norm.weight"
        trainer.begin()
        trainer.send({name: tensor for name, tensor in weights.items() if name != missing})
        kind, message = refusal(lambda: trainer.commit(1))
        assert kind == pb.ERROR_KIND_UPDATE_ORDER
        assert f"1 tensors of the set have not come, the first is {missing}" in message
        trainer.send({missing: weights[missing]})
        trainer.commit(1)
        assert rank.version == 1


class TestChecks:
    """E41: before a byte moves."""

    @pytest.mark.parametrize(
        ("name", "shape", "message"),
        [
            ("model.norm.weights", (64,), "the model has no tensor model.norm.weights"),
            ("model.norm.weight", (65,), r"model.norm.weight has shape (65,), the model's is (64,)"),
        ],
    )
    def test_a_wrong_name_or_shape_is_refused(
        self, world: World, name: str, shape: tuple[int, ...], message: str
    ) -> None:
        (rank,) = world.ranks(1)
        trainer = Trainer([rank])
        trainer.begin()
        kind, text = refusal(lambda: trainer.announce(world.new_weights() | {name: torch.zeros(shape)}))
        assert kind == pb.ERROR_KIND_INVALID_ARGUMENT
        assert message in text
        assert (rank.version, world.manifest(0).state) == (0, pb.ARENA_STATE_COMPLETE)

    def test_lists_of_other_lengths_are_refused(self, world: World) -> None:
        """E36."""
        (rank,) = world.ranks(1)
        Trainer([rank]).begin()
        update = write_update([describe("a", torch.zeros(1))], packed=False, buffer_size=0, buffer_count=0)
        del update.dtypes[:]
        assert "1 names, 0 dtypes and 1 shapes" in refusal(lambda: rank.step(check=update))[1]

    def test_a_trainer_with_another_key_is_not_let_into_the_group(self, world: World) -> None:
        (rank,) = world.ranks(1)
        with pytest.raises(CommunicatorError):
            Trainer([rank], key="another")
        until(lambda: rank.status.done, "the rank gives up")
        assert "another token" in rank.status.error
        assert "init comes first" in refusal(lambda: rank.step(begin=pb.BeginUpdate()))[1]


class TestFailures:
    """E46."""

    def break_off(self, trainer: Trainer, weights: Weights) -> None:
        """The trainer is gone in the middle of the set."""
        broadcaster = trainer.announce(weights, packed=False)
        sent = 0

        def tensor(name: str) -> torch.Tensor:
            nonlocal sent
            sent += 1
            if sent > 3:
                raise RuntimeError("the trainer fails")
            return weights[name]

        with pytest.raises(RuntimeError, match="the trainer fails"):
            broadcaster.send(tensor, lambda _done: None, 10)
        trainer.group.abort("the trainer fails")
        trainer.group.close()

    def test_in_place_there_is_no_version_until_a_full_set_has_come(self, world: World) -> None:
        ranks = world.ranks(2)
        trainer = Trainer(ranks, deadline_seconds=1.0)
        trainer.begin()
        self.break_off(trainer, world.new_weights())
        assert all(trainer.wait())
        for rank in ranks:
            assert "the step before failed" in refusal(lambda rank=rank: rank.step(prepare=pb.PrepareCommit()))[1]
            rank.step(abort=pb.AbortWeightUpdate(reason="it failed"))
        assert [rank.version for rank in ranks] == [None, None]
        assert not any(rank.updates.whole for rank in ranks)
        assert [world.manifest(rank).state for rank in (0, 1)] == [pb.ARENA_STATE_UPDATING] * 2
        # Not even a new process takes the checkpoint for it.
        ranks = world.ranks(2)
        assert [rank.version for rank in ranks] == [None, None]
        healed = Trainer(ranks)
        healed.begin()
        healed.send(world.new_weights(1))
        healed.commit(2)
        assert [rank.version for rank in ranks] == [2, 2]
        assert all(rank.updates.whole for rank in ranks)

    def test_an_abort_before_the_first_byte_leaves_the_version(self, world: World) -> None:
        (rank,) = world.ranks(1)
        before = rank.parameters()
        trainer = Trainer([rank])
        trainer.begin()
        rank.step(abort=pb.AbortWeightUpdate(reason="changed my mind"))
        assert rank.version == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in rank.parameters().items())

    def test_an_abort_releases_a_rank_that_waits_for_the_trainer(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = Trainer([rank], deadline_seconds=60.0)
        trainer.begin()
        trainer.announce(world.new_weights())
        started = time.monotonic()
        rank.step(abort=pb.AbortWeightUpdate(reason="enough"))
        rank.step(abort=pb.AbortWeightUpdate(reason="twice is once"))
        assert time.monotonic() - started < 5
        assert rank.version is None

    def test_the_end_of_the_epoch_ends_the_group(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = Trainer([rank], deadline_seconds=60.0)
        trainer.begin()
        trainer.announce(world.new_weights())
        rank.updates.leave("the epoch ends")
        assert "init comes first" in refusal(lambda: rank.step(begin=pb.BeginUpdate()))[1]


class TestShadow:
    def test_the_weights_in_use_are_untouched_until_the_commit(self, world: World) -> None:
        """E46, U35."""
        ranks = world.ranks(2)
        before = [rank.parameters() for rank in ranks]
        weights = world.new_weights()
        trainer = Trainer(ranks)
        trainer.begin(shadow=True)
        trainer.send(weights)
        for rank, old in zip(ranks, before, strict=True):
            assert rank.version == 0
            assert all(torch.equal(tensor, old[name]) for name, tensor in rank.parameters().items())
            assert world.manifest(rank.rank).state == pb.ARENA_STATE_COMPLETE
        trainer.commit(4)
        expected = world.loaded_elsewhere(weights, 2)
        for rank, wanted in zip(ranks, expected, strict=True):
            assert rank.version == 4
            assert all(torch.equal(tensor, wanted[name]) for name, tensor in rank.parameters().items())
        # What is held is the new arena, whole.
        assert [rank.version for rank in world.ranks(2)] == [4, 4]

    def test_a_failure_changes_nothing(self, world: World) -> None:
        (rank,) = world.ranks(1)
        before = rank.parameters()
        trainer = Trainer([rank])
        trainer.begin(shadow=True)
        TestFailures().break_off(trainer, world.new_weights())
        trainer.wait()
        rank.step(abort=pb.AbortWeightUpdate(reason="it failed"))
        assert rank.version == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in rank.parameters().items())

    def test_without_room_it_is_refused_with_both_numbers(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """E46."""
        (rank,) = world.ranks(1)
        trainer = Trainer([rank])
        monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 4096)
        with pytest.raises(ArenaMemoryError, match=r"weights arena 1 of rank 0 needs \d+ bytes, 4096 are free"):
            trainer.begin(shadow=True)
        assert rank.version == 0

    def test_updates_give_back_all_memory(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = Trainer([rank])

        def update(version: int, *, shadow: bool) -> None:
            trainer.begin(shadow=shadow)
            trainer.send(world.new_weights(version))
            trainer.commit(version)

        update(1, shadow=True)
        descriptors = open_descriptors()
        mappings = mapped_arenas()
        for version in range(2, 12):
            update(version, shadow=version % 2 == 0)
        assert open_descriptors() <= descriptors
        assert mapped_arenas() <= mappings


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def mapped_arenas() -> int:
    return sum("memfd:tpmodel" in line for line in Path("/proc/self/maps").read_text().splitlines())
