"""Weight updates into whole servers while things go wrong, under load, and into the other model types."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from support.checkpoints import ARCHITECTURES, make_checkpoint
from support.scale import UPDATED_ARCHITECTURES
from support.trainer import TOKEN, chooses
from support.updated_server import GREEDY, PROMPTS, Served, serve
from support.waiting import until
from tpmodel import Client, Result
from tpmodel.channel import metadata
from tpmodel.trainer import Trainer, WeightUpdateError
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.auth import update_group_key
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.packing import describe, write_update

HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("two"), 2, "--rebuild-limit", "1000") as server:
        yield server


def kill_a_rank(served: Served) -> None:
    """Returns when the world has been rebuilt without it."""
    state = served.state()
    os.kill(state.ranks[1].pid, signal.SIGKILL)

    def rebuilt() -> bool:
        now = served.state()
        return now.epoch > state.epoch and now.ready_ranks == 2

    until(rebuilt, "the world is rebuilt", 60)


def test_a_rank_that_dies_after_an_update_comes_back_with_the_updated_weights(served: Served) -> None:
    """E46, U35: out of its arena; greedy output is that of transformers with the trainer's weights."""
    with served.connect() as trainer:
        served.update(trainer)
    kill_a_rank(served)
    assert served.served().version == served.version
    served.check()


STAGES = ("joined", "started", "half sent", "all sent")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_a_rank_that_dies_during_an_update_leaves_no_half_set(served: Served, mode: str, stage: str) -> None:
    """E46, U35: the version before where no byte of it has moved, else none until a full set has come."""
    weights = list(served.trained.weights.items())

    def at(present: str) -> None:
        if present == stage:
            kill_a_rank(served)

    def update(trainer: Trainer) -> None:
        at("joined")
        with trainer.update(served.version + 1) as update:
            at("started")
            update.send({name: tensor + 1 for name, tensor in weights[:3]})
            at("half sent")
            update.send({name: tensor + 1 for name, tensor in weights[3:]})
            at("all sent")

    with served.connect(mode=mode) as trainer, pytest.raises(WeightUpdateError):
        update(trainer)
    if mode == "shadow" or stage in ("joined", "started"):
        served.check()
    else:
        assert served.served().reason == "WeightsIncomplete"
    served.heal()
    served.check()


class TestReplies:
    """Every reply names the version being served."""

    def test_from_the_first_call_to_the_last(self, served: Served) -> None:
        """E45: in place there is none from the first byte to the commit."""
        before = served.version
        weights = served.trained.weights
        store = start_store(HOST)
        authorization: dict[str, Any] = {"metadata": metadata(TOKEN), "timeout": 60}
        with served.stub() as stub:
            described = stub.GetParameterInfo(pb.GetParameterInfoRequest(), **authorization)
            init = pb.InitUpdateRequest(
                master_address=HOST,
                master_port=store.port,
                rank_offset=1,
                world_size=3,
                mode=pb.UPDATE_MODE_IN_PLACE,
                deadline_seconds=30,
            )
            joining = stub.InitUpdate.future(init, **authorization)
            member = GroupMember(
                master_address=HOST,
                master_port=store.port,
                rank=0,
                size=3,
                device=torch.device("cpu"),
                address=HOST,
                timeout_seconds=30,
                deadline_seconds=30,
            )
            group = join_update_group(member, key=update_group_key(TOKEN, HOST, store.port))
            replies = [described, joining.result()]
            session = joining.result().session
            with pytest.raises(grpc.RpcError, match="this call is due when it is started"):
                stub.FinishUpdate(pb.FinishUpdateRequest(version=before + 1, session=session), **authorization)
            start = pb.StartUpdateRequest(running=pb.RUNNING_REQUESTS_KEEP, session=session)
            replies.append(stub.StartUpdate(start, **authorization))
            assert [reply.served.version for reply in replies] == [before] * 3
            infos = [describe(name, tensor) for name, tensor in weights.items()]
            request = write_update(infos, packed=False, buffer_size=0, buffer_count=0)
            request.session = session
            updating = stub.Update(request, **authorization)
            first = next(updating)
            with torch.no_grad():
                Broadcaster(group, infos, buffer_size=0, buffer_count=1).send(weights.__getitem__, lambda _: None, 30)
            during = [first, *updating, stub.GetVersion(pb.GetVersionRequest(), **authorization)]
            assert not any(reply.served.HasField("version") for reply in during)
            assert {reply.served.newest_version for reply in during} == {before}
            version = served.next_version()
            finish = stub.FinishUpdate(pb.FinishUpdateRequest(version=version, session=session), **authorization)
            abort = stub.AbortUpdate(pb.AbortUpdateRequest(reason="done", session=session), **authorization)
            group.abort("done")
            group.close()
        assert [reply.served.version for reply in (finish, abort)] == [version, version]
        served.check()


class Load:
    """Requests that run all the time, and what they got."""

    def __init__(self, target: str) -> None:
        self.results: list[tuple[list[int], Result]] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(target, prompt)) for prompt in PROMPTS]
        for thread in self._threads:
            thread.start()

    def _run(self, target: str, prompt: list[int]) -> None:
        with Client(target) as client:
            while not self._over.is_set():
                self.results.append((prompt, client.complete(prompt, max_tokens=30, **GREEDY)))

    def has(self, version: int) -> bool:
        """Whether a request was answered by that version alone."""
        return any(result.completion.weight_versions == (version,) for _, result in list(self.results))

    def end(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


@pytest.mark.parametrize("tp", [4])
def test_updates_under_load_at_four_ranks(tmp_path: Path, tp: int) -> None:
    """E46, U35: a real trainer loop; whoever got tokens of one version got exactly that version's."""
    with serve(tmp_path, tp) as served:
        models = {0: copy.deepcopy(served.trained.model)}
        load = Load(served.server.target)
        try:
            for options in ({}, {"mode": "shadow"}, {"transport": "indexed"}):
                with served.connect(buffer_size=50_000, **options) as trainer:
                    served.update(trainer)
                    models[served.version] = copy.deepcopy(served.trained.model)
                until(lambda: load.has(served.version), "a request is all of the new weights", 60)
        finally:
            load.end()
        served.check()
    for prompt, result in load.results:
        if len(result.completion.weight_versions) == 1:
            (version,) = result.completion.weight_versions
            assert chooses(models[version], prompt, list(result.token_ids[0])), version


@pytest.mark.parametrize("architecture", UPDATED_ARCHITECTURES)
def test_other_model_types_are_updated_in_both_modes(tmp_path: Path, architecture: str) -> None:
    """E39, E40: experts stacked, linear attention fused by the map that loading uses; U35: what the prefix cache has of
    the old weights, blocks and snapshots of recurrent state, is not used again."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", seed=3, **ARCHITECTURES[architecture])
    with serve(tmp_path, 2, "--block-size", "1", checkpoint=checkpoint) as served:
        check: Callable[[], None] = served.check
        check()
        for options in ({}, {"mode": "shadow"}, {"transport": "indexed"}):
            assert max(served.cached_tokens()) > 0
            with served.connect(buffer_size=50_000, **options) as trainer:
                served.update(trainer)
            assert max(served.cached_tokens()) == 0
            check()
