"""A rank's part of a copy of weights: real arenas, a real pipe to the same rank of another gang, no engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.update_ranks import CPU, HOST, Rank, World, open_world, refusal
from support.update_trainer import Trainer
from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.weights.copying import WeightCopies
from tpmodel_worker.weights.persister import Persister

SECONDS = 60.0
KEY = "of one copy"


class Copying:
    """A rank that gives its weights away, or takes those of another."""

    def __init__(self, world: World, rank: Rank, key: str = KEY) -> None:
        self.world = world
        self.rank = rank
        self.key = key
        self.transfers = Handovers(rank=rank.rank, device=CPU, device_id="", address=HOST, token="")
        self.copies = WeightCopies(
            rank=rank.rank,
            device=CPU,
            address=HOST,
            arenas=world.arenas,
            shard=rank,
            transfers=self.transfers,
            persister=Persister(rank.rank, lambda _status: None),
            updating=lambda: rank.updates.begun,
        )

    def commit_as(self, version: int) -> None:
        """As a trainer's update would have left the weights."""
        assert self.rank.loaded is not None
        manifest = self.world.manifest(self.rank.rank)
        manifest.weight_version = version
        self.world.arenas.update_manifest(manifest)
        self.rank.replace_weights(arena=self.rank.loaded.arena, digest=self.rank.loaded.digest, version=version)

    def step(self, version: int = 3, transfer: str = "copy", **role: object) -> pb.WeightCopyOk:
        request = pb.WeightCopyRequest(
            transfer=transfer,
            version=version,
            deadline_seconds=SECONDS,
            key=self.key,
            **role,  # type: ignore[arg-type]
        )
        with torch.inference_mode():
            return self.copies.execute(request)

    def send(self, version: int = 3) -> weights_pb2.WeightEndpoint:
        return self.step(version, send=pb.SendWeights()).endpoint

    def receive(self, endpoint: weights_pb2.WeightEndpoint) -> None:
        self.step(receive=pb.CopyWeightsFrom(endpoint=endpoint))

    def commit(self) -> None:
        self.step(commit=pb.CommitWeightCopy())

    def error(self) -> str:
        """How its part has ended."""
        transfer = self.transfers.find("copy")
        assert transfer is not None
        return transfer.outcome.result(SECONDS).error

    @property
    def state(self) -> pb.ArenaState.ValueType:
        return self.world.manifest(self.rank.rank).state


@contextlib.contextmanager
def two_gangs(folder: Path, world_size: int = 1, **taker: object) -> Iterator[list[tuple[Copying, Copying]]]:
    """By rank: the giver, with version 3, and the taker, with another checkpoint."""
    for name in ("giver", "taker"):
        (folder / name).mkdir()
    with open_world(folder / "giver") as giving, open_world(folder / "taker") as taking:
        givers = [Copying(giving, rank) for rank in giving.ranks(world_size)]
        for giver in givers:
            giver.commit_as(3)
        takers = [Copying(taking, rank) for rank in taking.ranks(world_size, **({"seed": 2} | taker))]
        yield list(zip(givers, takers, strict=True))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_rank_has_what_the_same_rank_of_the_other_gang_has(tmp_path: Path, world_size: int) -> None:
    """E46: version and digests are committed as those of an update."""
    with two_gangs(tmp_path, world_size) as pairs:
        for giver, taker in pairs:
            taker.receive(giver.send())
        assert [(giver.error(), taker.error()) for giver, taker in pairs] == [("", "")] * world_size
        for giver, taker in pairs:
            taker.commit()
            assert not taker.copies.unfinished
            assert taker.rank.version == 3
            theirs = giver.rank.parameters()
            assert all(torch.equal(tensor, theirs[name]) for name, tensor in taker.rank.parameters().items())
            given, taken = giver.world.manifest(taker.rank.rank), taker.world.manifest(taker.rank.rank)
            assert (taken.state, taken.weight_version) == (pb.ARENA_STATE_COMPLETE, 3)
            assert list(taken.digests) == list(given.digests)
        again = pairs[0][1].world.ranks(world_size)
        assert [(rank.loaded.mapped, rank.version) for rank in again if rank.loaded] == [(True, 3)] * world_size


def test_what_was_not_committed_is_not_used_by_a_rank_that_is_made_again(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        before = taker.rank.parameters()
        taker.receive(giver.send())
        assert taker.error() == ""
        assert (taker.state, taker.copies.unfinished) == (pb.ARENA_STATE_LOADING, True)
        (again,) = taker.world.ranks(1)
        assert again.loaded is not None
        assert (again.loaded.mapped, again.version) == (False, 0)
        assert all(torch.equal(tensor, before[name]) for name, tensor in again.parameters().items())


def test_damaged_bytes_are_found_by_their_digests_and_cannot_be_committed(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        assert giver.rank.loaded is not None
        with torch.inference_mode():
            giver.rank.loaded.arena.bytes[300] ^= 1
        taker.receive(giver.send())
        assert taker.error().endswith("is not what the other gang committed")
        kind, message = refusal(taker.commit)
        assert (kind, "no copy of the weights has come" in message) == (pb.ERROR_KIND_UPDATE_ORDER, True)
        assert taker.copies.unfinished


def test_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    with two_gangs(tmp_path, vocab_size=523) as ((giver, taker),):
        taker.receive(giver.send())
        assert "the other rank's weights are others: its layout_hash is" in taker.error()


def test_a_version_that_the_rank_does_not_have_is_not_sent(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, _taker),):
        kind, message = refusal(lambda: giver.send(4))
        assert kind == pb.ERROR_KIND_UPDATE_ORDER
        assert "version 4 of the weights is asked for, this rank has 3" in message


def test_weights_that_a_copy_has_overwritten_are_not_sent(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        taker.receive(giver.send())
        assert taker.error() == ""
        assert "this rank has none that are whole" in refusal(lambda: taker.send(0))[1]


def test_what_is_left_before_it_came_to_an_end_can_be_copied_again(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        giver.send()
        giver.copies.leave("a weight update begins")
        assert giver.error() == "a weight update begins"
        giver.send()
        nobody = weights_pb2.WeightEndpoint(address=HOST, port=9)
        taker.receive(nobody)
        taker.copies.leave("the engine says so")
        assert taker.error() == "the engine says so"
        giver.copies.leave("another one comes")
        taker.receive(giver.send())
        assert (giver.error(), taker.error()) == ("", "")


def test_one_copy_is_under_way_at_a_time(tmp_path: Path) -> None:
    """Two that wrote into one arena would leave a mixture."""
    with two_gangs(tmp_path) as ((giver, taker),):
        endpoint = giver.send()
        taker.receive(weights_pb2.WeightEndpoint(address=HOST, port=9))
        for step in (lambda: taker.receive(endpoint), taker.commit, giver.send):
            kind, message = refusal(step)
            assert (kind, "a copy of the weights is under way" in message) == (pb.ERROR_KIND_UPDATE_ORDER, True)
        for one in (giver, taker):
            one.copies.leave("enough")


def test_no_copy_begins_while_a_weight_update_has_the_weights(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        endpoint = giver.send()
        giver.copies.leave("a weight update begins")
        for one, step in ((giver, giver.send), (taker, lambda: taker.receive(endpoint))):
            Trainer([one.rank]).begin(shadow=False)
            kind, message = refusal(step)
            assert (kind, "a weight update is under way" in message) == (pb.ERROR_KIND_UPDATE_ORDER, True)


@pytest.mark.parametrize(("version", "transfer"), [(4, "copy"), (3, "another")])
def test_only_the_copy_that_has_come_is_committed(tmp_path: Path, version: int, transfer: str) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        taker.receive(giver.send())
        assert taker.error() == ""
        message = refusal(lambda: taker.step(version, transfer, commit=pb.CommitWeightCopy()))[1]
        assert "version 3 has come by 'copy'" in message
        assert taker.state == pb.ARENA_STATE_LOADING
        taker.commit()
        assert taker.state == pb.ARENA_STATE_COMPLETE


def test_a_shadow_update_heals_what_a_copy_has_overwritten_and_taken_back_it_brings_that_back_as_of_no_use(
    tmp_path: Path,
) -> None:
    """E46: neither served nor kept in a file."""
    with two_gangs(tmp_path) as ((giver, taker),):
        rank = taker.rank
        rank.updates.keep(str(tmp_path / "kept"))
        taker.commit_as(2)
        taker.receive(giver.send())
        assert taker.error() == ""
        trainer = Trainer([rank])
        trainer.begin(shadow=True)
        trainer.send(taker.world.new_weights())
        rank.step(prepare=pb.PrepareCommit(version=4))
        rank.step(commit=pb.CommitUpdate(version=4))
        assert not taker.copies.unfinished
        rank.step(abort=pb.AbortWeightUpdate(reason="another rank could not commit"))
        assert (taker.copies.unfinished, taker.state, rank.version) == (True, pb.ARENA_STATE_LOADING, 2)
        assert rank.persisted == pb.PersistStatus()


def test_nobody_without_the_key_gets_weights(tmp_path: Path) -> None:
    with two_gangs(tmp_path) as ((giver, taker),):
        stranger = Copying(taker.world, taker.rank, key="another")
        stranger.receive(giver.send())
        assert "token" in stranger.error() + giver.error()
