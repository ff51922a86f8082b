"""What the engine says to pods and hears from them: other attempts, other checkpoints, drains."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from support.fake_rank import TOKEN, FakeGang, answers_after, fake_gang, until
from support.whole_engine import ATTEMPT, TIMEOUTS, engine_settings, register, request, until_phase
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.requests import RefusedError
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings


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


async def test_pod_that_is_not_registered_drains_nothing(engine: Engine, gang: FakeGang) -> None:
    """A pod of an older attempt finds the new leader under the old name."""
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="is not of this gang"):
            await stub.Drain(worker_pb2.DrainRequest(pod_uid="old"), metadata=token_metadata(TOKEN), timeout=5.0)
    await asyncio.sleep(0.1)
    assert engine.status.phase == worker_pb2.PHASE_SERVING


async def test_refused_pod_is_told_the_engines_attempt(engine: Engine, gang: FakeGang) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(engine, gang.registration(attempt=ATTEMPT - 1))
    assert ("tpmodel-attempt", str(ATTEMPT)) in list(caught.value.trailing_metadata())
    assert engine.status.phase == worker_pb2.PHASE_FORMING


async def test_pod_of_a_higher_attempt_ends_a_serving_engine(engine: Engine, gang: FakeGang) -> None:
    """Fencing: the old leader does not go on beside the new one."""
    await register(engine, gang.registration(attempt=ATTEMPT))
    await until_phase(engine, worker_pb2.PHASE_SERVING)
    with pytest.raises(grpc.aio.AioRpcError):
        await register(engine, gang.registration(attempt=ATTEMPT + 1, pod_uid="new"))
    state = await until_phase(engine, worker_pb2.PHASE_FAILED)
    assert state.exit_code == 75
    assert state.cause == f"stale attempt: the gang is at attempt {ATTEMPT + 1}, this engine is of attempt {ATTEMPT}"
    await until(lambda: all(rank.aborts for rank in gang.ranks))
    with pytest.raises(RefusedError):
        engine.submit(request())


async def test_pod_with_another_checkpoint_is_refused_and_told_the_gangs(
    engine: Engine, gang: FakeGang, settings: ServeSettings
) -> None:
    registration = gang.registration(attempt=ATTEMPT)
    registration.model_path = "/cache/models/org--name/other"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await register(engine, registration)
    assert ("tpmodel-model-path", settings.model_path) in list(caught.value.trailing_metadata())
    assert engine.status.state.ranks[0].state == "missing"


async def test_followers_see_every_phase(engine: Engine, gang: FakeGang) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        following = stub.Follow(worker_pb2.FollowRequest(pod_uid="local"), metadata=token_metadata(TOKEN))
        seen: list[worker_pb2.Phase.ValueType] = []

        async def follow() -> None:
            async for state in following:
                if not seen or state.phase != seen[-1]:
                    seen.append(state.phase)

        task = asyncio.create_task(follow())
        await until(lambda: bool(seen))
        await register(engine, gang.registration(attempt=ATTEMPT))
        await until(lambda: seen[-1] == worker_pb2.PHASE_SERVING)
        engine.drain(5.0)
        await until(lambda: seen[-1] == worker_pb2.PHASE_DRAINED)
        task.cancel()
    assert seen[0] == worker_pb2.PHASE_FORMING
    assert worker_pb2.PHASE_LOADING in seen


async def test_drain_takes_new_requests_until_endpoints_have_propagated(
    settings: ServeSettings, gang: FakeGang
) -> None:
    engine = Engine(dataclasses.replace(settings, endpoint_propagation=0.5), timeouts=TIMEOUTS)
    await engine.start()
    try:
        await register(engine, gang.registration(attempt=ATTEMPT))
        await until_phase(engine, worker_pb2.PHASE_SERVING)
        gang[0].on["generate_step"] = answers_after(0.05, gang[0].on["generate_step"])
        engine.drain(10.0, "pod a drains")
        await until(lambda: engine.status.state.leaving)
        assert engine.status.phase == worker_pb2.PHASE_SERVING
        engine.submit(request(1))
        state = await until_phase(engine, worker_pb2.PHASE_DRAINING)
        assert state.cause == "pod a drains"
        with pytest.raises(RefusedError, match="draining"):
            engine.submit(request(2))
        await until_phase(engine, worker_pb2.PHASE_DRAINED)
        assert gang[0].model is not None
        assert gang[0].model.computed_tokens == 3 + 99
    finally:
        await engine.stop()
