"""Worlds that are rebuilt in place, with fake ranks and a fake supervisor over real gRPC."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.fake_rank import (
    HEALTHY,
    TOKEN,
    FakeGang,
    answers_after,
    fails,
    fake_gang,
    hangs,
    is_stuck,
    run_plan,
    until,
)
from support.fake_supervisor import FakeSupervisor, fake_supervisor
from support.simulated_rank import true_outputs
from support.whole_engine import ATTEMPT, TIMEOUTS, engine_settings, register, request, until_phase
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.requests import QueueFullError, RefusedError, SequenceOutput
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings

FIRST_EPOCH = (ATTEMPT << 32) | 1
REBUILDING, SERVING, FAILED = worker_pb2.PHASE_REBUILDING, worker_pb2.PHASE_SERVING, worker_pb2.PHASE_FAILED


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    return dataclasses.replace(engine_settings(tmp_path), recovery_mode="InPlace", queue_limit=4)


@pytest.fixture
async def gang() -> AsyncIterator[FakeGang]:
    async with fake_gang(2) as ranks:
        yield ranks


@pytest.fixture
async def supervisor(gang: FakeGang) -> AsyncIterator[FakeSupervisor]:
    async with fake_supervisor(gang) as made:
        yield made


class Served:
    """An engine whose world serves, and what its requests brought."""

    def __init__(self, engine: Engine, gang: FakeGang, supervisor: FakeSupervisor) -> None:
        self.engine, self.gang, self.supervisor = engine, gang, supervisor
        self.outputs: list[SequenceOutput] = []
        self.phases: list[worker_pb2.Phase.ValueType] = []
        engine.status.listen(lambda state: self.phases.append(state.phase))
        engine._front.deliver = self._take  # pyright: ignore[reportAttributeAccessIssue]
        engine.world._sink = self._take

    def _take(self, outputs: Sequence[SequenceOutput]) -> None:
        self.outputs += outputs

    def tokens(self, key: int = 1) -> list[int]:
        return [token for output in self.outputs if output.key == (1, key) for token in output.token_ids]

    def error(self, key: int = 1) -> tuple[int, str] | None:
        return next((output.error for output in self.outputs if output.key == (1, key) and output.error), None)

    def ended(self, key: int = 1) -> bool:
        return any(output.key == (1, key) and output.finish_reason is not None for output in self.outputs)

    async def register(self) -> None:
        await register(self.engine, self.supervisor.registration(attempt=ATTEMPT))

    async def kill(self, rank: int) -> None:
        """The process of a rank is gone, and the supervisor has seen it."""
        self.supervisor.tell_exit(self.gang[rank])
        await self.gang[rank].stop()

    async def replace(self, rank: int) -> None:
        await self.gang[rank].restart()
        await self.register()


@pytest.fixture
async def served(settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor) -> AsyncIterator[Served]:
    engine = Engine(settings, timeouts=TIMEOUTS)
    made = Served(engine, gang, supervisor)
    await engine.start()
    try:
        await made.register()
        await until_phase(engine, SERVING)
        await until(lambda: bool(supervisor._watchers))
        for rank in gang.ranks:
            rank.on["generate_step"] = answers_after(0.005, run_plan)
        yield made
    finally:
        await engine.stop()


TRUE = true_outputs([1, 2, 3], request().sampling, 50)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_request_goes_on_in_the_next_world_after_a_rank_died(served: Served, rank: int) -> None:
    """W26: a rank process that goes is a newer generation: unbuilt, rebuilt at the next epoch; P17."""
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 5)
    await served.kill(rank)
    await until_phase(served.engine, REBUILDING)
    before = served.tokens()
    assert before == TRUE[: len(before)] != TRUE
    await served.replace(rank)
    state = await until_phase(served.engine, SERVING)
    await until(served.ended)
    assert served.tokens() == TRUE
    assert state.epoch == FIRST_EPOCH + 1
    assert state.last_faults[-1].kind == "rank_exited"
    assert f"rank {rank}: its process (pid {1000 + rank}) was killed by SIGKILL" in state.last_faults[-1].message
    survivor = served.gang[1 - rank]
    assert [abort.epoch for abort in survivor.aborts] == [FIRST_EPOCH]
    assert survivor.names().count("unload_model") == 0
    assert served.supervisor.kills == []
    (rebuild,) = state.last_rebuilds
    names = [phase.name for phase in rebuild.phases]
    assert names == ["abort", "respawn", "init", "check", "map", "clear", "first_step", "replay"]
    assert (rebuild.replayed_requests, rebuild.builds, rebuild.epoch) == (1, 1, state.epoch)
    assert sum(phase.seconds for phase in rebuild.phases) == pytest.approx(rebuild.seconds, abs=0.01)


async def test_health_flips_before_anybody_is_waited_for(served: Served) -> None:
    """DESIGN section 4: clients' health within a second of detection, though the abort is not confirmed."""
    served.gang[1].on["generate_step"] = is_stuck
    served.gang[0].on["generate_step"] = fails(worker_pb2.ERROR_KIND_INTERNAL, "an exception in a step")
    started = time.monotonic()
    served.engine.submit(request())
    await until(lambda: REBUILDING in served.phases, 1.0)
    assert time.monotonic() - started < 1.0


async def test_requests_that_come_while_rebuilding_queue_within_the_limit(served: Served) -> None:
    """W22."""
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    for key in range(1, 5):
        served.engine.submit(request(key))
    with pytest.raises(QueueFullError):
        served.engine.submit(request(5))
    assert served.engine.cancel((1, 4))
    await served.replace(1)
    await until(lambda: all(served.ended(key) for key in (1, 2, 3)))
    assert [served.tokens(key) for key in (1, 2, 3, 4)] == [TRUE, TRUE, TRUE, []]


async def test_a_request_whose_time_is_over_before_the_next_world_fails_unavailable(served: Served) -> None:
    served.engine.submit(dataclasses.replace(request(1), deadline=time.time() + 0.6))
    await until(lambda: len(served.tokens()) > 2)
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    served.engine.submit(dataclasses.replace(request(2), deadline=time.time() + 0.3))
    await until(lambda: served.error(1) is not None and served.error(2) is not None)
    for key in (1, 2):
        code, message = served.error(key) or (0, "")
        assert code == 14
        assert "rebuilding" in message
    assert all(output.retry_after > 0 for output in served.outputs if output.error)


async def test_a_request_without_a_deadline_has_the_default_one_while_rebuilding(
    settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor
) -> None:
    engine = Engine(dataclasses.replace(settings, rebuild_wait=0.3), timeouts=TIMEOUTS)
    served = Served(engine, gang, supervisor)
    await engine.start()
    try:
        await served.register()
        await until_phase(engine, SERVING)
        gang[0].on["generate_step"] = answers_after(0.01, run_plan)
        engine.submit(request(1))
        await until(lambda: len(served.tokens()) > 2)
        await gang[1].stop()
        await until(lambda: served.error(1) is not None)
        assert (served.error(1) or (0,))[0] == 14
        assert len(engine.status.state.last_faults) == 1, "a rank that is waited for is one fault"
    finally:
        await engine.stop()


async def test_a_rank_that_does_not_leave_the_epoch_is_killed(served: Served) -> None:
    """P17: step deadline, Abort, then the supervisor: only the hung process is replaced."""
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 2)
    served.gang[1].ignores_aborts = True
    served.gang[1].on["generate_step"] = is_stuck
    await until(lambda: bool(served.supervisor.kills), 10)
    assert [(kill.rank, kill.pid) for kill in served.supervisor.kills] == [(1, 1001)]
    assert served.engine.status.state.last_faults[-1].kind == "step_deadline"
    await served.replace(1)
    await until(served.ended)
    assert served.tokens() == TRUE


async def test_a_rank_whose_device_is_lost_is_replaced_though_it_answers(served: Served) -> None:
    """RECOVERY_NOTES: a poisoned context never comes back in the same process."""
    served.gang[1].on["generate_step"] = fails(worker_pb2.ERROR_KIND_DEVICE_POISONED, "illegal memory access")
    served.engine.submit(request())
    await until(lambda: bool(served.supervisor.kills))
    assert [kill.rank for kill in served.supervisor.kills] == [1]
    assert served.engine.status.state.last_faults[-1].kind == "device_poisoned"
    await served.replace(1)
    await until(served.ended)
    assert served.tokens() == TRUE


async def test_an_error_inside_a_step_replaces_no_process(served: Served) -> None:
    """P11: the same processes, at the next epoch, without anybody's registration."""
    fails_once = fails(worker_pb2.ERROR_KIND_INTERNAL, "an exception in a step")

    async def once(rank: object, session: object, message: worker_pb2.SessionRequest) -> None:
        served.gang[1].on["generate_step"] = run_plan
        await fails_once(served.gang[1], session, message)  # pyright: ignore[reportArgumentType]

    served.gang[1].on["generate_step"] = once
    served.engine.submit(request())
    await until(served.ended)
    assert served.tokens() == TRUE
    assert served.supervisor.kills == []
    assert served.engine.status.state.epoch == FIRST_EPOCH + 1
    assert [rank.endpoint.pid for rank in served.gang.ranks] == [1000, 1001]


async def test_a_build_that_fails_is_the_next_epoch(served: Served) -> None:
    """W19, W21: also in mid-init, and the weights of the others stay."""
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 2)
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    await served.gang[1].restart()
    served.gang[0].on["init"] = hangs
    served.gang[1].on["init"] = fails(worker_pb2.ERROR_KIND_COMMUNICATOR, "no device")
    await served.register()
    await until(lambda: bool(served.gang[1].aborts))
    served.gang[0].on = dict(served.gang[1].on) | {"init": FakeGang(2)[0].on["init"]}
    served.gang[1].on["init"] = served.gang[0].on["init"]
    await until(served.ended)
    assert served.tokens() == TRUE
    assert served.engine.status.state.epoch > FIRST_EPOCH + 1
    assert "unload_model" not in served.gang[0].names()


async def test_ranks_that_wait_at_a_store_that_is_gone_meet_at_the_next_one_at_once(served: Served) -> None:
    """W19: not when the time to join is over."""
    for rank in served.gang.ranks:
        rank.on["init"] = hangs
    served.engine.submit(request())
    await served.kill(1)
    await served.gang[1].restart()
    served.gang[1].on["init"] = hangs
    await served.register()
    await until(lambda: all(rank.names().count("init") == 2 - rank.rank for rank in served.gang.ranks))
    for rank in served.gang.ranks:
        rank.on["init"] = HEALTHY["init"]
    moved = served.supervisor.registration(attempt=ATTEMPT, rendezvous="127.0.0.1:2")
    await register(served.engine, moved)
    state = await until_phase(served.engine, SERVING)
    await until(served.ended)
    assert served.tokens() == TRUE
    last = [fault for fault in state.last_faults if fault.kind == "rendezvous_moved"][-1]
    assert "the ranks meet at 127.0.0.1:1, but the store is 127.0.0.1:2 now" in last.message


async def test_rebuilds_that_follow_each_other_spend_the_budget(
    settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor
) -> None:
    """DESIGN section 6: past the cap 75, with the cause; and the next engine of the pod goes on counting."""
    settings = dataclasses.replace(settings, rebuild_limit=1)
    engine = Engine(settings, timeouts=TIMEOUTS)
    served = Served(engine, gang, supervisor)
    await engine.start()
    try:
        await served.register()
        await until_phase(engine, SERVING)
        gang[1].on["generate_step"] = fails(worker_pb2.ERROR_KIND_INTERNAL, "an exception in a step")
        engine.submit(request())
        state = await until_phase(engine, FAILED)
        assert state.exit_code == 75
        assert "1 rebuilds did not bring a stable world" in state.cause
        assert "an exception in a step" in state.cause
        await until(lambda: served.error() is not None)
        assert (served.error() or (0,))[0] == 14
    finally:
        await engine.stop()


async def test_an_engine_after_one_that_served_takes_a_rebuild_from_the_budget(
    settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor
) -> None:
    """Counted over restarts of engine and container."""
    settings = dataclasses.replace(settings, rebuild_limit=1)
    left: list[int] = []
    for _ in range(2):
        engine = Engine(settings, timeouts=TIMEOUTS)
        await engine.start()
        try:
            await register(engine, supervisor.registration(attempt=ATTEMPT))
            state = await until_phase(engine, SERVING)
            left.append(state.rebuilds_left)
        finally:
            await engine.stop()
    assert left == [1, 0]
    engine = Engine(settings, timeouts=TIMEOUTS)
    await engine.start()
    try:
        state = await until_phase(engine, FAILED)
        assert state.exit_code == 75
        assert "the engine ended while its world served" in state.cause
    finally:
        await engine.stop()


async def test_a_drain_while_rebuilding_finishes_what_runs(served: Served) -> None:
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 2)
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    served.engine.drain(10.0)
    await until_phase(served.engine, worker_pb2.PHASE_DRAINING)
    with pytest.raises(RefusedError, match="draining"):
        served.engine.submit(request(2))
    await served.replace(1)
    await until_phase(served.engine, worker_pb2.PHASE_DRAINED)
    assert served.tokens() == TRUE
    assert SERVING not in served.phases[served.phases.index(worker_pb2.PHASE_DRAINING) :]


async def test_a_stop_while_rebuilding_ends_at_once(served: Served) -> None:
    served.engine.submit(request())
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    started = time.monotonic()
    await served.engine.stop()
    assert time.monotonic() - started < 3
    assert served.error() is not None


async def ask_to_rebuild(
    engine: Engine, *, source: str = "user", generation: int = 0, token: str = TOKEN
) -> worker_pb2.RebuildResponse:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        message = worker_pb2.RebuildRequest(source=source, generation=generation)
        return await stub.Rebuild(message, metadata=token_metadata(token), timeout=5.0)


async def test_a_request_for_a_newer_world_aborts_what_is_in_flight_and_rebuilds(served: Served) -> None:
    """W25, W26: older and equal generations are ignored; it costs nothing of the budget, and streams go on."""
    left = served.engine.status.state.rebuilds_left
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 2)
    asked = await ask_to_rebuild(served.engine, generation=5)
    assert (asked.accepted, asked.generation, asked.epoch) == (True, 5, FIRST_EPOCH)
    await until(served.ended)
    assert served.tokens() == TRUE
    state = served.engine.status.state
    assert state.epoch == FIRST_EPOCH + 1
    assert [rank.aborts[0].epoch for rank in served.gang.ranks] == [FIRST_EPOCH] * 2
    assert state.last_faults[-1].kind == "newer_generation"
    assert "generation 5 of user" in state.last_faults[-1].message
    assert state.rebuilds_left == left
    for generation in (5, 4):
        again = await ask_to_rebuild(served.engine, generation=generation)
        assert (again.accepted, again.generation) == (False, 5)
    assert (await ask_to_rebuild(served.engine)).generation == 6
    await until(lambda: served.engine.status.state.epoch == FIRST_EPOCH + 2)


async def test_a_newer_generation_while_unbuilt_is_recorded_and_triggers_a_build(
    settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor
) -> None:
    """W26."""
    engine = Engine(settings, timeouts=TIMEOUTS)
    await engine.start()
    try:
        gang[1].on["init"] = fails(worker_pb2.ERROR_KIND_COMMUNICATOR, "no device")
        await register(engine, supervisor.registration(attempt=ATTEMPT))
        # Pauses between builds grow to seconds.
        await until(lambda: gang[1].names().count("init") >= 4, 10)
        gang[1].on["init"] = gang[0].on["init"]
        asked = time.monotonic()
        assert (await ask_to_rebuild(engine, generation=7)).accepted
        await until_phase(engine, SERVING)
        assert time.monotonic() - asked < 1.0
        assert not (await ask_to_rebuild(engine, generation=7)).accepted
    finally:
        await engine.stop()


async def test_a_rise_of_the_operators_counter_rebuilds(
    settings: ServeSettings, gang: FakeGang, supervisor: FakeSupervisor, tmp_path: Path
) -> None:
    """W27: what it finds at first is silent, so is what it finds again."""
    (tmp_path / "rebuild").write_text("3")
    engine = Engine(dataclasses.replace(settings, gang_dir=str(tmp_path)), timeouts=TIMEOUTS)
    await engine.start()
    try:
        await register(engine, supervisor.registration(attempt=ATTEMPT))
        await until_phase(engine, SERVING)
        await asyncio.sleep(1.2)
        assert engine.status.state.epoch == FIRST_EPOCH
        (tmp_path / "rebuild").write_text("4")
        await until(lambda: engine.status.state.epoch == FIRST_EPOCH + 1 and engine.status.phase == SERVING)
        assert "generation 4 of operator" in engine.status.state.last_faults[-1].message
    finally:
        await engine.stop()


@pytest.mark.parametrize(
    ("mode", "token", "code"),
    [
        ("Restart", TOKEN, grpc.StatusCode.FAILED_PRECONDITION),
        ("InPlace", "wrong", grpc.StatusCode.UNAUTHENTICATED),
    ],
)
async def test_a_request_to_rebuild_is_refused(
    settings: ServeSettings, mode: Any, token: str, code: grpc.StatusCode
) -> None:
    engine = Engine(dataclasses.replace(settings, recovery_mode=mode), timeouts=TIMEOUTS)
    await engine.start()
    try:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask_to_rebuild(engine, token=token)
        assert caught.value.code() is code
    finally:
        await engine.stop()


async def test_a_rank_that_registers_as_another_process_is_a_newer_generation(served: Served) -> None:
    """W26: also where neither its session nor its supervisor said anything."""
    served.engine.submit(request())
    await until(lambda: len(served.tokens()) > 2)
    served.gang[1].pid += 1
    await served.register()
    await until(served.ended)
    assert served.tokens() == TRUE
    assert served.engine.status.state.epoch == FIRST_EPOCH + 1


async def test_a_supervisor_that_takes_no_watch_is_reported_and_asked_again(
    settings: ServeSettings,
    gang: FakeGang,
    supervisor: FakeSupervisor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W27: the subscription is bounded (5 s), and its failure is told."""
    monkeypatch.setattr("tpmodel_worker.engine.supervisors.SUBSCRIPTION_SECONDS", 0.2)
    supervisor.refuses_watches = True
    engine = Engine(settings, timeouts=TIMEOUTS)
    await engine.start()
    try:
        await register(engine, supervisor.registration(attempt=ATTEMPT))
        await until(lambda: supervisor.watches >= 3)
        assert caplog.text.count("the processes of pod local are not watched: no answer within 0.2 s") == 1
        assert engine.status.phase == SERVING
    finally:
        await engine.stop()


@pytest.fixture
def room(gang: FakeGang) -> None:
    """Of ranks that keep recurrent state, the second of which has less memory."""
    for rank, blocks, snapshots in ((gang[0], 40, 8), (gang[1], 30, 5)):
        rank.state_bytes, rank.kv_blocks, rank.state_snapshots = 1000, blocks, snapshots


@pytest.mark.parametrize(("found", "used"), [((60, 9), (30, 5)), ((20, 3), (20, 3))], ids=["more", "less"])
async def test_the_caches_of_a_rebuilt_world_are_no_larger_than_they_were(
    room: None, served: Served, found: tuple[int, int], used: tuple[int, int]
) -> None:
    """P17: so that ranks that are still there keep their memory, whatever a new process finds free."""
    replaced = served.gang[1]
    await served.kill(1)
    await until_phase(served.engine, REBUILDING)
    replaced.kv_blocks, replaced.state_snapshots = found
    await served.replace(1)
    await until_phase(served.engine, SERVING)
    clears = [asked.clear_kv_cache for asked in served.gang[0].requests if asked.HasField("clear_kv_cache")]
    assert [(clear.num_blocks, clear.state_snapshots) for clear in clears] == [(30, 5), used]
