"""A gang that has lost its weights gets them from another gang of the model that serves them, or says why not."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from support.checkpoints import make_checkpoint
from support.handover import start_all, stop_all
from support.local_servers import kill_all, metric
from support.stand_in_giver import Giver, givers
from support.trainer import TOKEN, TrainedModel
from support.updated_server import (
    GREEDY,
    PROMPTS,
    TOKEN_FILE,
    Served,
    Stream,
    prepare,
    prepare_checkpoint,
    raw_stream,
)
from support.waiting import until
from tpmodel import Client
from tpmodel.channel import metadata
from tpmodel.local import LocalServer
from tpmodel.trainer import connect
from tpmodel.v1 import weights_pb2 as pb

LONG = 100
"""Tokens of the streams that run while a gang starts and copies, one after the other."""


def copies(server: LocalServer, direction: str, outcome: str) -> float:
    """How many the server has counted."""
    labels = f'{{direction="{direction}",outcome="{outcome}"}} '
    return metric(server.metrics_url, f"tpmodel_weight_copies_total{labels}")


class Pair:
    """Two gangs of one model, the second of which takes the weights of the first."""

    def __init__(self, folder: Path, tp: int) -> None:
        self.folder = folder
        self.tp = tp
        self.checkpoint = prepare_checkpoint(folder, tp)
        self.trained = TrainedModel(self.checkpoint)
        self.token_file = folder / TOKEN_FILE
        server = prepare(folder, tp, checkpoint=self.checkpoint)
        self.giver = Served(server, self.trained, self.checkpoint, self.token_file, ranks=tp)
        self.taker = self.make_taker()

    def make_taker(self) -> Served:
        """A server that takes the weights of the giver; not started yet."""
        source = ["--weights-from", self.giver.server.control_target]
        server = prepare(self.folder, self.tp, *source, checkpoint=self.checkpoint)
        return Served(server, self.trained, self.checkpoint, self.token_file, self.giver.version, ranks=self.tp)

    def update(self) -> None:
        """Both, by one trainer."""
        self.trained.train()
        version = self.giver.next_version()
        targets = [self.giver.server.control_target, self.taker.server.control_target]
        with connect(targets, token=TOKEN, options={"deadline_seconds": 20}) as trainer:
            trainer.send_weights(self.trained.weights, version=version)
        self.taker.version = version


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Of two ranks each; gangs of one are below."""
    pair = Pair(tmp_path_factory.mktemp("pair"), 2)
    start_all([pair.giver.server, pair.taker.server])
    try:
        yield pair
    finally:
        stop_all([pair.giver.server, pair.taker.server])


def test_a_gang_whose_processes_were_all_killed_comes_back_with_the_weights_of_the_other(pair: Pair) -> None:
    """E46: digests checked; greedy output is that of transformers with the trainer's weights; the other one serves."""
    pair.update()
    pair.taker.check()
    with Client(pair.giver.server.target) as client:
        alone = client.complete(PROMPTS[0], max_tokens=LONG, **GREEDY).token_ids[0]
    kill_all(pair.taker.server)
    pair.taker = pair.make_taker()
    pair.taker.server.launch()
    streams: list[Stream] = []
    while not pair.taker.server.target:
        assert pair.taker.server.process.poll() is None, pair.taker.server.output
        streams.append(Stream(pair.giver.server.target, PROMPTS[0], LONG).end())
    pair.taker.check()
    assert pair.taker.state().weights_condition == ""
    assert [stream.error for stream in streams] == [None] * len(streams)
    assert {tuple(stream.tokens) for stream in streams} == {tuple(alone)}
    assert copies(pair.giver.server, "sent", "done") == 1
    assert copies(pair.taker.server, "received", "done") == 1


def test_the_copied_weights_are_committed_as_an_update_is(pair: Pair) -> None:
    """A rank that dies afterwards comes back with them, and the next update follows them."""
    if pair.taker.state().weight_version != pair.giver.version:
        pytest.fail("the test before has left no copy behind")
    rank = pair.taker.state().ranks[-1].pid
    os.kill(rank, signal.SIGKILL)
    until(lambda: pair.taker.state().ranks[-1].pid not in (0, rank) and pair.taker.ready(), "the rank is back")
    pair.taker.check()
    pair.update()
    pair.taker.check()
    pair.giver.check()


class TestGiver:
    """What a gang whose weights are copied does meanwhile."""

    def request(self, pair: Pair, **changed: object) -> pb.CopyWeightsRequest:
        with pair.giver.stub() as stub:
            answer = stub.GetVersion(pb.GetVersionRequest(), metadata=metadata(TOKEN), timeout=10)
        request = pb.CopyWeightsRequest(version=answer.served.version, set=answer.set)
        for name, value in changed.items():
            setattr(request.set if name in request.set.DESCRIPTOR.fields_by_name else request, name, value)
        return request

    def test_it_refuses_a_second_copy_and_gives_way_to_a_trainer(self, pair: Pair) -> None:
        with pair.giver.stub() as stub:
            request = self.request(pair)
            # Whoever calls this never connects to the ranks: the copy goes on until something ends it.
            first = stub.CopyWeights(request, metadata=metadata(TOKEN), timeout=60)
            assert len(next(first).offer.endpoints) == pair.tp
            with pytest.raises(grpc.RpcError, match="another gang is copying the weights"):
                next(stub.CopyWeights(request, metadata=metadata(TOKEN), timeout=10))
            pair.giver.check()
            pair.update()
            with pytest.raises(grpc.RpcError, match="a trainer's update began"):
                next(first)
        pair.giver.check()

    def test_a_copy_whose_taker_goes_away_makes_room_for_the_next(self, pair: Pair) -> None:
        with pair.giver.stub() as stub:
            request = self.request(pair)
            first = stub.CopyWeights(request, metadata=metadata(TOKEN), timeout=60)
            next(first)
            first.cancel()

            def accepted() -> bool:
                call = stub.CopyWeights(request, metadata=metadata(TOKEN), timeout=60)
                try:
                    return bool(next(call).offer.endpoints)
                except grpc.RpcError:
                    return False
                finally:
                    call.cancel()

            until(accepted, "the next copy is accepted")

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"ranks": 4}, "tensor-parallel size: 2 there, 4 here"),
            ({"dtype": "bfloat16"}, "dtype: 'float32' there, 'bfloat16' here"),
            ({"source": "other"}, "checkpoint that versions count from: '' there, 'other' here"),
            ({"version": 10_000}, r"version 10000 is asked for, this gang serves version \d+"),
        ],
    )
    def test_it_refuses_what_does_not_fit_before_a_byte_moves(
        self, pair: Pair, changed: dict[str, object], message: str
    ) -> None:
        with pair.giver.stub() as stub:
            call = stub.CopyWeights(self.request(pair, **changed), metadata=metadata(TOKEN), timeout=10)
            with pytest.raises(grpc.RpcError, match=message):
                next(call)

    def test_it_refuses_whoever_does_not_know_the_token(self, pair: Pair) -> None:
        with pair.giver.stub() as stub:
            call = stub.CopyWeights(self.request(pair), metadata=metadata("another token"), timeout=10)
            with pytest.raises(grpc.RpcError, match="takes the trainer's token"):
                next(call)


class Lost:
    """A gang that wants a version which several others fail to give it."""

    def __init__(self, folder: Path, trained: TrainedModel, givers: dict[str, Giver]) -> None:
        self.folder = folder
        self.checkpoint = prepare_checkpoint(folder, 1)
        self.givers = givers
        self.served = Served(self._launched(), trained, self.checkpoint, folder / TOKEN_FILE, 7)

    def start_anew(self) -> None:
        """With nothing in memory."""
        kill_all(self.served.server)
        self.served.server = self._launched()

    def _launched(self) -> LocalServer:
        sources = [option for giver in self.givers.values() for option in ("--weights-from", giver.target)]
        server = prepare(self.folder, 1, *sources, checkpoint=self.checkpoint)
        server.launch()
        return server

    def message(self) -> str:
        try:
            return self.served.state().weights_message
        except grpc.RpcError:
            return ""


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lost]:
    folder = tmp_path_factory.mktemp("lost")
    given = make_checkpoint(folder / "given" / "checkpoint", seed=77)
    behaviours = {"killed": "dies", "damaged": "damaged", "older": "good", "wider": "good", "stranger": "good"}
    with givers(given, version=7, token=TOKEN, **behaviours) as found:  # type: ignore[arg-type]
        found["older"].version = 5
        found["wider"].set.ranks = 4
        found["stranger"].token = "another token"
        lost = Lost(folder, TrainedModel(given), found)
        try:
            yield lost
        finally:
            lost.served.server.stop()


@pytest.mark.parametrize(
    ("giver", "cause"),
    [
        ("killed", "rank 0: "),
        ("damaged", "rank 0: tensor .* is not what the other gang committed"),
        ("older", "it serves version 5, wanted is 7"),
        ("wider", "tensor-parallel size: 4 there, 1 here"),
        ("stranger", "UNAUTHENTICATED: the call lacks the right bearer token"),
    ],
)
def test_the_condition_says_why_each_of_the_others_gave_nothing(lost: Lost, giver: str, cause: str) -> None:
    """E46: WeightsLost, never the checkpoint in silence."""
    said = re.compile(rf"version 7 is lost.*{re.escape(lost.givers[giver].target)}: {cause}")
    until(lambda: said.search(lost.message()) is not None, f"said: {said.pattern}", 240)
    assert lost.served.state().weights_condition == "WeightsLost"
    assert not lost.served.ready()
    assert not lost.served.served().HasField("version")
    listening = re.search(r"gRPC on (\S+),", lost.served.server.output)
    assert listening is not None
    assert raw_stream(listening[1], begun=False).result(30) == grpc.StatusCode.UNAVAILABLE


def test_it_asks_again_until_one_of_them_gives_what_is_wanted(lost: Lost) -> None:
    until(
        lambda: "" not in lost.givers["killed"].copies and len(lost.givers["killed"].copies) > 1, "it asks again", 120
    )
    lost.givers["damaged"].behaviour = "good"
    until(lambda: bool(lost.served.server.target), "the server is ready", 120)
    lost.served.check()
    assert copies(lost.served.server, "received", "failed") >= 2
    assert copies(lost.served.server, "received", "done") == 1


def test_a_trainer_heals_a_gang_in_the_middle_of_a_copy(lost: Lost) -> None:
    """E46: the copy gives way; what the trainer sends is whole, also for a rank that is made again."""
    giver = lost.givers["damaged"]
    giver.behaviour, giver.version = "stalls", 8
    lost.start_anew()
    until(lambda: f"version 8 is being copied from {giver.target}" in lost.message(), "it copies", 120)
    lost.served.version = 8
    with lost.served.connect() as trainer:
        lost.served.update(trainer)
    until(lambda: bool(lost.served.server.target), "the server is ready", 120)
    lost.served.check()
    assert copies(lost.served.server, "received", "failed") == 1
    rank = lost.served.state().ranks[0].pid
    os.kill(rank, signal.SIGKILL)
    until(lambda: lost.served.state().ranks[0].pid not in (0, rank) and lost.served.ready(), "the rank is back")
    lost.served.check()
