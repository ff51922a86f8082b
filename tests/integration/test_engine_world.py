"""The life of the world with fake ranks over real gRPC: formed when whole, retried, given up with a cause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from support.fake_rank import (
    TOKEN,
    FakeGang,
    FakeRank,
    FakeSession,
    answers_after,
    ends_session,
    fails,
    fake_gang,
    hangs,
    until,
)
from support.whole_engine import ATTEMPT, TIMEOUTS, engine_settings, register, request, until_phase
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.requests import RefusedError
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings

FIRST_EPOCH = (ATTEMPT << 32) | 1


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    return engine_settings(tmp_path)


@pytest.fixture
async def gang() -> AsyncIterator[FakeGang]:
    async with fake_gang(2) as ranks:
        yield ranks


@pytest.fixture
async def engine(settings: ServeSettings) -> AsyncIterator[Engine]:
    made = Engine(settings, timeouts=TIMEOUTS)
    await made.start()
    yield made
    await made.stop()


async def test_world_is_taken_through_every_step_in_order(
    engine: Engine, gang: FakeGang, settings: ServeSettings
) -> None:
    """W18, W21."""
    gang[1].kv_blocks = 40
    instance = await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_SERVING)
    assert instance == engine.instance_id == gang[0].sessions[0].instance_id
    for rank in gang.ranks:
        assert rank.names() == ["init", "nccl_sanity_check", "weight_update", "load_dense_shard", "clear_kv_cache"]
        assert {message.epoch for message in rank.requests} == {FIRST_EPOCH}
        init = rank.requests[0].init
        assert (init.rank, init.world_size, init.rendezvous) == (rank.rank, 2, "127.0.0.1:1")
        assert (init.instance_id, list(init.pods)) == (instance, ["local", "local"])
        load = rank.requests[3].load_dense_shard
        assert load.safetensors_paths == [str(Path(settings.model_path) / "model.safetensors")]
        assert json.loads(load.config_json) == {"model_type": "qwen3"}
        assert (load.dtype, load.max_model_len, load.block_size) == ("float32", 256, 16)
        assert rank.requests[4].clear_kv_cache.num_blocks == 40
    assert gang[0].requests[0].init.rendezvous_id == gang[1].requests[0].init.rendezvous_id
    assert (state.epoch, state.ready_ranks, state.kv_blocks_total, state.block_size) == (FIRST_EPOCH, 2, 40, 16)
    assert [(rank.state, rank.communicator, rank.device) for rank in state.ranks] == [("ready", "fake", "fake")] * 2
    assert state.load_percent == 100.0


async def test_world_waits_for_every_member(engine: Engine, gang: FakeGang) -> None:
    """W18, W19: a missing member is waited for, and its arrival is enough."""
    await register(engine, gang.registration(attempt=ATTEMPT, without=[1]))
    await asyncio.sleep(0.3)
    assert engine.status.phase == worker_pb2.PHASE_FORMING
    assert [rank.state for rank in engine.status.state.ranks] == ["connected", "missing"]
    assert gang[0].names() == []
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)


async def test_building_twice_is_a_no_op(engine: Engine, gang: FakeGang) -> None:
    """W18."""
    for _ in range(2):
        await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    membership = engine._members.complete  # what run() builds of
    assert membership is not None
    first = await engine.world.build(membership)
    assert await engine.world.build(membership) is first
    assert gang[0].names().count("init") == 1


async def test_epoch_is_above_the_highest_that_any_rank_has_seen(engine: Engine, gang: FakeGang) -> None:
    gang[1].highest_epoch = (ATTEMPT << 32) | 41
    await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_SERVING)
    assert state.epoch == (ATTEMPT << 32) | 42


async def test_failed_first_build_is_cleaned_up_and_tried_again(engine: Engine, gang: FakeGang) -> None:
    """W19, W21: a device that is missing at first comes back, without a new registration."""
    healthy = gang[1].on["init"]
    gang[0].on["init"] = hangs
    gang[1].on["init"] = fails(worker_pb2.ERROR_KIND_COMMUNICATOR, "device cuda:1 is missing")
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until(lambda: len(engine.status.state.last_faults) > 0)
    assert [rank.aborts[0].epoch for rank in gang.ranks] == [FIRST_EPOCH] * 2
    assert not engine.world.built
    assert "device cuda:1 is missing" in engine.status.state.last_faults[0].message
    gang[0].on["init"] = gang[1].on["init"] = healthy
    state = await until_phase(engine, worker_pb2.PHASE_SERVING)
    assert state.epoch > FIRST_EPOCH
    assert engine.world.built


async def test_rank_that_died_while_forming_is_replaced_by_its_next_registration(
    engine: Engine, gang: FakeGang
) -> None:
    """W19, W20."""
    gang[1].on["init"] = hangs
    gang[0].on["init"] = hangs
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until(lambda: gang[1].names() == ["init"])
    await gang[1].stop()
    await until(lambda: len(engine.status.state.last_faults) > 0)
    gang[1].port = 0
    gang[0].on = dict(FakeRank(0, 2).on)
    gang[1].on = dict(FakeRank(1, 2).on)
    await gang[1].start()
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)


async def test_sum_that_is_wrong_leaves_the_world_unbuilt(engine: Engine, gang: FakeGang) -> None:
    """P8, W21."""

    async def alone(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        await session.send(request, nccl_sanity_result=worker_pb2.NcclSanityResult(observed_sum=1))

    gang[1].on["nccl_sanity_check"] = alone
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until(lambda: len(engine.status.state.last_faults) > 0)
    assert all(rank.aborts for rank in gang.ranks)
    assert "rank 1: observed a sum of 1" in engine.status.state.last_faults[0].message
    assert not engine.world.built
    assert "load_dense_shard" not in gang[0].names()


@pytest.mark.parametrize(
    "kind",
    [
        worker_pb2.ERROR_KIND_UNSUPPORTED_MODEL,
        worker_pb2.ERROR_KIND_BAD_CHECKPOINT,
        worker_pb2.ERROR_KIND_INVALID_ARGUMENT,
    ],
)
async def test_configuration_error_of_a_load_fails_for_good(
    engine: Engine, gang: FakeGang, kind: worker_pb2.ErrorKind.ValueType
) -> None:
    """P9: and the other rank has dropped its shard."""
    gang[1].on["load_dense_shard"] = fails(kind, "supported: qwen3")
    await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 64
    assert "rank 1: " in state.cause
    assert "supported: qwen3" in state.cause
    for rank in gang.ranks:
        assert rank.names() == ["init", "nccl_sanity_check", "weight_update", "load_dense_shard", "unload_model"]
        assert rank.aborts


async def test_missing_checkpoint_fails_for_good(engine: Engine, gang: FakeGang, settings: ServeSettings) -> None:
    (Path(settings.model_path) / "config.json").unlink()
    await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 64
    assert "config.json can't be read" in state.cause


async def test_no_room_for_the_kv_cache_fails_for_good_with_numbers(engine: Engine, gang: FakeGang) -> None:
    gang[1].kv_blocks = 0
    await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 64
    assert "a block of 16 tokens takes 512 bytes" in state.cause


async def test_kv_cache_smaller_than_the_context_is_a_warning(
    engine: Engine, gang: FakeGang, caplog: pytest.LogCaptureFixture
) -> None:
    gang[0].kv_blocks = 3
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    assert "the KV cache holds 48 tokens (3 blocks of 16), less than the context of 256" in caplog.text


async def test_other_failures_of_a_load_are_tried_again_and_then_restart_the_gang(
    engine: Engine, gang: FakeGang
) -> None:
    gang[0].on["load_dense_shard"] = fails(worker_pb2.ERROR_KIND_INTERNAL, "I/O error")
    await register(engine, gang.registration(attempt=ATTEMPT))
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert (state.exit_code, gang[0].names().count("load_dense_shard")) == (75, 3)
    assert "loading failed 3 times" in state.cause
    assert "rank 0: internal: I/O error" in state.cause


async def test_load_that_fails_once_is_no_failure(engine: Engine, gang: FakeGang) -> None:
    """W19."""
    healthy = gang[0].on["load_dense_shard"]

    async def fails_once(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        rank.on["load_dense_shard"] = healthy
        await ends_session(rank, session, request)

    gang[0].on["load_dense_shard"] = fails_once
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)


async def test_requests_before_the_build_are_refused(engine: Engine, gang: FakeGang) -> None:
    """W22: while forming, while loading, and after a failure."""

    def refusal() -> tuple[int, str]:
        with pytest.raises(RefusedError) as caught:
            engine.submit(request())
        return caught.value.code, str(caught.value)

    assert refusal() == (14, "world not built yet")
    gang[0].on["load_dense_shard"] = answers_after(
        0.5, fails(worker_pb2.ERROR_KIND_UNSUPPORTED_MODEL, "model_type 'x'")
    )
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_LOADING)
    assert refusal() == (14, "world not built yet")
    await until_phase(engine, worker_pb2.PHASE_FAILED)
    code, message = refusal()
    assert code == 14
    assert message.startswith("world not built yet: ")
    assert "model_type 'x'" in message


async def test_rank_that_dies_while_serving_fails_the_world_and_spares_the_engine(
    engine: Engine, gang: FakeGang
) -> None:
    """W20: the gang is restarted; the engine lives to say so."""
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    await gang[1].stop()
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 75
    assert "rank 1: session closed before reply" in state.cause
    await until(lambda: len(gang[0].aborts) > 0)
    assert await register(engine, gang.registration(attempt=ATTEMPT)) == engine.instance_id


async def test_hung_step_of_a_serving_world_aborts_every_rank(engine: Engine, gang: FakeGang) -> None:
    """P17."""
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    for rank in gang.ranks:
        rank.on["generate_step"] = hangs
    engine.submit(request())
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 75
    assert state.last_faults[-1].kind == "step_deadline"
    assert [rank.aborts[0].epoch for rank in gang.ranks] == [FIRST_EPOCH] * 2


@pytest.mark.parametrize(
    ("attempt", "token", "code"),
    [
        (ATTEMPT + 1, TOKEN, grpc.StatusCode.FAILED_PRECONDITION),
        (ATTEMPT, "wrong", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
async def test_registration_of_strangers_is_refused(
    engine: Engine, gang: FakeGang, attempt: int, token: str, code: grpc.StatusCode
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(engine, gang.registration(attempt=attempt), token)
    assert caught.value.code() is code
    assert engine.status.state.ranks[0].state == "missing"


async def test_engine_of_an_older_attempt_leaves_the_ranks_alone(engine: Engine, gang: FakeGang) -> None:
    gang[0].highest_epoch = ((ATTEMPT + 1) << 32) | 1
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until(lambda: len(engine.status.state.last_faults) > 0)
    assert f"a rank has seen attempt {ATTEMPT + 1}" in engine.status.state.last_faults[0].message
    assert gang[0].sessions == []


async def test_drain_finishes_what_runs_refuses_what_comes_and_says_bye(engine: Engine, gang: FakeGang) -> None:
    """P16."""
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    gang[0].on["generate_step"] = answers_after(0.02, gang[0].on["generate_step"])
    engine.submit(request(1))
    engine.drain(10.0)
    await until_phase(engine, worker_pb2.PHASE_DRAINING)
    with pytest.raises(RefusedError, match="draining") as caught:
        engine.submit(request(2))
    assert caught.value.code == 14
    state = await until_phase(engine, worker_pb2.PHASE_DRAINED)
    assert [rank.names()[-1] for rank in gang.ranks] == ["shutdown"] * 2
    assert state.running == 0
    assert gang[0].model is not None
    assert gang[0].model.computed_tokens == 3 + 99
    assert not gang[0].aborts


async def test_drain_ends_what_runs_too_long(engine: Engine, gang: FakeGang) -> None:
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    gang[0].on["generate_step"] = answers_after(0.1, gang[0].on["generate_step"])
    engine.submit(request(1))
    engine.drain(0.2)
    await until_phase(engine, worker_pb2.PHASE_DRAINED)
    assert gang[0].names()[-1] == "shutdown"
    assert gang[0].model is not None
    assert gang[0].model.computed_tokens < 3 + 99


async def test_drain_while_forming_leaves_nothing_open(engine: Engine, gang: FakeGang) -> None:
    for rank in gang.ranks:
        rank.on["init"] = hangs
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until(lambda: gang[1].names() == ["init"])
    engine.drain(1.0)
    await until_phase(engine, worker_pb2.PHASE_DRAINED)
    assert all(rank.aborts for rank in gang.ranks)


async def test_pod_that_gets_sigterm_drains_the_gang(engine: Engine, gang: FakeGang) -> None:
    await register(engine, gang.registration(attempt=ATTEMPT))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        await stub.Drain(worker_pb2.DrainRequest(pod_uid="local"), metadata=token_metadata(TOKEN), timeout=5.0)
    await until_phase(engine, worker_pb2.PHASE_DRAINED)
