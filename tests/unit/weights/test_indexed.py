"""The indexed way, between a rank and a trainer: real arenas, real groups, no engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from support.update_ranks import CPU, HOST, Rank, Weights, World, open_world, refusal
from support.update_trainer import begin_join, wait_for_step
from support.waiting import until
from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.communicator import CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.indexed import (
    HEARTBEAT,
    MAX_ERRORS,
    STOP,
    IndexedReceiver,
    IndexedSender,
    ReceivingFailedError,
    TrainerStoppedError,
)
from tpmodel_worker.weights.indexed_group import IndexedGroups, join_indexed_groups
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.numbering import indexed_tensors
from tpmodel_worker.weights.packing import read_update


class IndexedTrainer:
    """Rank 0 of the groups, and what an engine would do for the ranks."""

    def __init__(self, ranks: list[Rank], deadline_seconds: float = 20.0) -> None:
        self.ranks = ranks
        store = begin_join(
            ranks,
            timeout_seconds=20,
            deadline_seconds=deadline_seconds,
            transport=weights_pb2.UPDATE_TRANSPORT_INDEXED,
        )
        member = GroupMember(
            master_address=HOST,
            master_port=store.port,
            rank=0,
            size=1 + len(ranks),
            device=CPU,
            address=HOST,
            timeout_seconds=20,
            deadline_seconds=deadline_seconds,
        )
        self.groups: IndexedGroups = join_indexed_groups(member)
        self.steps = 0
        assert self.wait() == [""] * len(ranks)
        self.set = indexed_tensors(ranks[0].step(describe=pb.DescribeWeights()).parameters)
        self.sender = IndexedSender(self.groups.data, read_update(self.set))

    def wait(self) -> list[str]:
        """Waits for the ranks' threads; their errors."""
        return wait_for_step(self.ranks, self.steps)

    def each(self, **step: object) -> None:
        for rank in self.ranks:
            rank.step(**step)

    def listen(self) -> None:
        """All ranks wait for an index."""
        self.steps += 1
        self.each(await_index=pb.AwaitIndex(tensors=self.set, step=self.steps))

    def receive(self) -> None:
        """All ranks receive, in place."""
        self.each(begin=pb.BeginUpdate())
        self.each(check=self.set)
        self.steps += 1
        self.each(receive=pb.ReceiveWeights(update=self.set, step=self.steps))

    def say(self, number: int) -> None:
        self.groups.data.broadcast(torch.tensor([number]), 0)

    def send(self, weights: Weights) -> None:
        for name in self.set.names:
            self.sender.send(name, weights[name])

    def commit(self, version: int) -> None:
        self.each(prepare=pb.PrepareCommit(version=version))
        self.each(commit=pb.CommitUpdate(version=version))
        self.each(confirm=pb.ConfirmCommit())


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with open_world(tmp_path) as world:
        yield world


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_have_what_loading_the_same_weights_gives(world: World, world_size: int) -> None:
    """U32, U33: full tensors, of which every rank cuts its part; the set begins with the first index."""
    ranks = world.ranks(world_size, num_key_value_heads=2, tie_word_embeddings=True)
    weights = world.new_weights()
    trainer = IndexedTrainer(ranks)
    trainer.listen()
    sending = threading.Thread(target=trainer.send, args=(weights,))
    sending.start()
    assert trainer.wait() == [""] * world_size
    assert [rank.status.stopped for rank in ranks] == [""] * world_size
    trainer.receive()
    sending.join(20)
    assert trainer.wait() == [""] * world_size
    trainer.commit(1)
    expected = world.loaded_elsewhere(weights, world_size)
    for rank, wanted in zip(ranks, expected, strict=True):
        assert rank.version == 1
        for name, parameter in rank.parameters().items():
            assert torch.equal(parameter, wanted[name]), name


def test_a_payload_lands_in_place_in_the_local_dtype_without_autograd(world: World) -> None:
    """U33: the storage keeps its address; what the trainer has in another dtype is converted before it is sent."""
    (rank,) = world.ranks(1)
    assert rank.loaded is not None
    before = {name: parameter.data_ptr() for name, parameter in rank.loaded.model.named_parameters()}
    trainer = IndexedTrainer([rank])
    weights = {name: tensor.double().requires_grad_() for name, tensor in world.new_weights().items()}
    trainer.receive()
    trainer.send(weights)
    assert trainer.wait() == [""]
    trainer.commit(1)
    parameters = dict(rank.loaded.model.named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in parameters.items()} == before
    assert not any(parameter.requires_grad or parameter.grad_fn for parameter in parameters.values())
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}


def test_both_sides_order_names_identically(world: World) -> None:
    """U30: by name; tied ones have no number, and a rank refuses any other order."""
    (rank,) = world.ranks(1, tie_word_embeddings=True)
    trainer = IndexedTrainer([rank])
    names = list(trainer.set.names)
    assert names == sorted(name for name in world.checkpoint() if name != "lm_head.weight")
    wrong = indexed_tensors(list(rank.step(describe=pb.DescribeWeights()).parameters))
    wrong.names[0], wrong.names[1] = wrong.names[1], wrong.names[0]
    wrong.shapes[0].CopyFrom(trainer.set.shapes[1])
    wrong.shapes[1].CopyFrom(trainer.set.shapes[0])
    kind, message = refusal(lambda: rank.step(await_index=pb.AwaitIndex(tensors=wrong, step=1)))
    assert kind == pb.ERROR_KIND_INVALID_ARGUMENT
    assert f"all {len(names)} that are not tied, in order" in message


class TestIndices:
    """U32."""

    def test_signs_of_life_and_wrong_numbers_are_passed_over_and_nothing_is_read_for_them(
        self, world: World, caplog: pytest.LogCaptureFixture
    ) -> None:
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank])
        weights = world.new_weights()
        count = len(trainer.set.names)
        trainer.receive()
        for position, name in enumerate(trainer.set.names):
            # Payloads of these would be taken for the next index.
            trainer.say((HEARTBEAT, count, -3, 1 << 40)[position % 4])
            trainer.sender.send(name, weights[name])
        assert trainer.wait() == [""]
        trainer.commit(1)
        assert torch.equal(rank.parameters()["model.norm.weight"], weights["model.norm.weight"])
        skipped = [record.message for record in caplog.records if "is skipped" in record.message]
        assert {line.split()[1] for line in skipped} == {str(count), "-3", str(1 << 40)}

    def test_minus_two_stops_a_rank_that_waits_for_a_set(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank])
        trainer.listen()
        trainer.say(STOP)
        assert trainer.wait() == [""]
        assert rank.status.stopped == "the trainer has stopped"
        assert rank.version == 0

    def test_signs_of_life_keep_a_rank_waiting_beyond_the_deadline_of_a_collective(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank], deadline_seconds=1.5)
        trainer.listen()
        for _ in range(8):
            threading.Event().wait(0.3)
            trainer.sender.heartbeat()
        assert not rank.status.done
        until(lambda: rank.status.signs == 8, "eight signs")
        trainer.sender.stop()
        assert trainer.wait() == [""]

    def test_without_them_the_deadline_ends_the_waiting(self, world: World) -> None:
        """U34: bounded."""
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank], deadline_seconds=0.3)
        trainer.listen()
        (error,) = trainer.wait()
        assert f"{MAX_ERRORS} errors in a row" in error


class TestWhole:
    """U35."""

    def test_half_a_set_has_no_version_and_a_tensor_that_comes_twice_counts_once(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank])
        weights = world.new_weights()
        first, *others = trainer.set.names
        trainer.receive()
        for _ in range(len(trainer.set.names)):
            trainer.sender.send(first, weights[first])
        until(lambda: rank.status.received_bytes > 0, "the first bytes")
        assert not rank.status.done
        assert (rank.version, rank.updates.whole) == (None, False)
        for name in others:
            trainer.sender.send(name, weights[name])
        assert trainer.wait() == [""]
        assert rank.version is None
        trainer.commit(1)
        assert rank.version == 1

    def test_a_trainer_that_stops_in_the_middle_leaves_no_version(self, world: World) -> None:
        (rank,) = world.ranks(1)
        trainer = IndexedTrainer([rank])
        trainer.receive()
        trainer.sender.send(trainer.set.names[0], world.new_weights()[trainer.set.names[0]])
        trainer.say(STOP)
        (error,) = trainer.wait()
        assert "the trainer has stopped in a set that lacks" in error
        assert rank.version is None


class TestGroups:
    """U31."""

    def join(self, port: int, rank: int, cancelled: threading.Event, seconds: float = 20.0) -> IndexedGroups:
        member = GroupMember(
            master_address=HOST,
            master_port=port,
            rank=rank,
            size=2,
            device=CPU,
            address=HOST,
            timeout_seconds=seconds,
            deadline_seconds=20,
        )
        return join_indexed_groups(member, cancelled=cancelled)

    def test_there_are_two_groups_which_begin_with_a_barrier(self, world: World) -> None:
        trainer = IndexedTrainer(world.ranks(1))
        assert (trainer.groups.control.name, trainer.groups.data.name) == ("gloo", "gloo")
        assert trainer.groups.control is not trainer.groups.data
        assert trainer.groups.data.world_size == 2

    def test_joining_can_be_cancelled_while_the_trainer_is_not_there(self) -> None:
        store = start_store(HOST)
        cancelled = threading.Event()
        threading.Timer(0.3, cancelled.set).start()
        with pytest.raises(CommunicatorAbortedError):
            self.join(store.port, 1, cancelled, seconds=60)

    def test_a_trainer_that_does_not_come_is_an_error_within_the_time(self) -> None:
        store = start_store(HOST)
        with pytest.raises(CommunicatorError):
            self.join(store.port, 1, threading.Event(), seconds=1)


class BrokenGroup:
    """A group whose broadcasts do what the test says, one after the other."""

    device = CPU

    def __init__(self, *turns: int | Exception) -> None:
        self.turns = list(turns)

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        turn = self.turns.pop(0)
        if isinstance(turn, Exception):
            raise turn
        return tensor.fill_(turn)


class TestErrors:
    """U34."""

    def receiver(self, *turns: int | Exception) -> IndexedReceiver:
        set_of_one = weights_pb2.UpdateRequest(
            names=["a"], dtypes=["float32"], shapes=[weights_pb2.Shape(dimensions=[2])], indexed=True
        )
        return IndexedReceiver(
            BrokenGroup(*turns), read_update(set_of_one), cancelled=threading.Event(), retry_seconds=0.01
        )

    def run(self, receiver: IndexedReceiver, load: Callable[[str, torch.Tensor], None] | None = None) -> None:
        receiver.wait(lambda _bytes: None)
        receiver.receive(load or (lambda _name, _tensor: None), lambda _bytes: None)

    @pytest.mark.parametrize(
        "message",
        ["[1] Broken pipe", "recv: Connection reset by peer", "Connection closed by peer [127.0.0.1]:1"],
    )
    @pytest.mark.parametrize("before", [(), (0,)])
    def test_a_connection_that_ends_stops_it(self, message: str, before: tuple[int, ...]) -> None:
        with pytest.raises(TrainerStoppedError, match="the trainer has gone"):
            self.run(self.receiver(*before, RuntimeError(message)))

    def test_another_error_is_traced_and_the_next_index_may_be_right(self, caplog: pytest.LogCaptureFixture) -> None:
        got: list[float] = []
        receiver = self.receiver(RuntimeError("strange"), 0, 7, 0, 8)

        def load(_name: str, tensor: torch.Tensor) -> None:
            got.append(float(tensor[0]))
            if len(got) == 1:
                raise ValueError("not now")

        self.run(receiver, load)
        assert got == [7, 8]
        traced = [record for record in caplog.records if record.exc_info]
        assert len(traced) == 2

    def test_too_many_in_a_row_end_it(self) -> None:
        errors = [RuntimeError(f"strange {number}") for number in range(MAX_ERRORS)]
        with pytest.raises(ReceivingFailedError, match=f"{MAX_ERRORS} errors in a row, the last: strange 4"):
            self.run(self.receiver(*errors))

    def test_what_succeeds_in_between_counts(self) -> None:
        errors = [RuntimeError("strange")] * (MAX_ERRORS - 1)
        self.run(self.receiver(*errors, HEARTBEAT, *errors, 0, 1))
