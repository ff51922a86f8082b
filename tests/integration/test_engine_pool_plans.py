"""Plans over real gRPC: two ahead, settled before control requests, aborted at the first fault."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from support.fake_rank import (
    FakeGang,
    FakeRank,
    FakeSession,
    answers_after,
    ends_session,
    fails,
    fake_gang,
    hangs,
    is_stuck,
    run_plan,
    until,
)
from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import ChecksumError, PoolError, ProtocolError, StepDeadlineError
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.plans import PlanTimes
from tpmodel_worker.engine.pool import Pool, PoolTimeouts

EPOCH = (1 << 32) | 1
STEP_SECONDS = 0.5
TIMEOUTS = PoolTimeouts(drain=1.0, ping=0.3, clear=5.0, shutdown=1.0, close=0.2)
ONE_STEP = worker_pb2.GenerateStepRequest(steps=1, decode_slots=[0, 1])


@pytest.fixture
async def gang() -> AsyncIterator[FakeGang]:
    async with fake_gang(3) as ranks:
        yield ranks


@pytest.fixture
async def pool(gang: FakeGang) -> AsyncIterator[Pool]:
    times = PlanTimes(STEP_SECONDS)
    made = Pool(gang.channels(), epoch=EPOCH, instance_id="engine-1", times=times, wake=lambda: None, timeouts=TIMEOUTS)
    yield made
    await made.close()


async def send_plans(pool: Pool, count: int) -> None:
    """Sends so many plans, each as soon as it may go."""
    for _ in range(count):
        await until(lambda: pool.may_send_plan)
        pool.send_plan(ONE_STEP)


async def fault_of(pool: Pool) -> PoolError:
    await until(lambda: pool.error is not None)
    return await pool.failed()


async def test_same_bytes_go_to_every_rank_and_rank_0_answers_each_step(pool: Pool, gang: FakeGang) -> None:
    """P10."""
    plan = worker_pb2.GenerateStepRequest(steps=3, decode_slots=[1, 4], releases=[2])
    assert pool.next_seq == 1
    size = pool.send_plan(plan)
    replies: list[tuple[int, worker_pb2.GenerateStepOk]] = []
    while len(replies) < 3:
        await asyncio.sleep(0.005)
        replies += pool.take_replies()
    assert [(seq, reply.step) for seq, reply in replies] == [(1, 0), (1, 1), (1, 2)]
    await pool.settle()
    sent = worker_pb2.SessionRequest(epoch=EPOCH, seq=1, generate_step=plan)
    assert size == sent.ByteSize()
    assert [rank.plans()[0] for rank in gang.ranks] == [sent] * 3


async def test_other_rank_that_sends_tokens_is_a_fault(pool: Pool, gang: FakeGang) -> None:
    """P10."""

    async def talks(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        reply = worker_pb2.GenerateStepOk(slots=[0], token_ids=[5], checksum=rank.checksum(request.seq))
        await session.send(request, generate_step_ok=reply)

    gang[2].on["generate_step"] = talks
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert isinstance(error.engine, ProtocolError)
    assert "rank 2 sent tokens of plan 1; only rank 0 may" in str(error)


async def test_at_most_two_plans_are_outstanding(pool: Pool, gang: FakeGang) -> None:
    gate = asyncio.Event()

    async def gated(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        await gate.wait()
        await run_plan(rank, session, request)

    gang[0].on["generate_step"] = gated
    pool.send_plan(ONE_STEP)
    assert pool.may_send_plan
    pool.send_plan(ONE_STEP)
    assert not pool.may_send_plan
    with pytest.raises(RuntimeError, match="none may"):
        pool.send_plan(ONE_STEP)
    gate.set()
    await until(lambda: pool.may_send_plan)


async def test_plans_are_settled_on_every_rank_before_a_control_request(pool: Pool, gang: FakeGang) -> None:
    """P11: rank 2 is behind; ClearKvCache does not overtake its plans."""
    gang[1].ack_every = gang[2].ack_every = 100
    slow = answers_after(0.05, run_plan)
    gang[2].on["generate_step"] = slow
    await send_plans(pool, 3)
    await pool.clear_kv_cache(0)
    for rank in gang.ranks:
        assert rank.names() == ["generate_step"] * 4 + ["clear_kv_cache"]
        assert [request.seq for request in rank.requests] == [1, 2, 3, 4, 5]
        settling = rank.requests[3].generate_step
        assert (settling.steps, settling.ack_now) == (0, True)
    assert [seq for seq, _ in pool.take_replies()] == [1, 2, 3]


async def test_settled_ranks_are_not_asked_again(pool: Pool, gang: FakeGang) -> None:
    """P11."""
    await send_plans(pool, 1)
    await pool.settle()
    await pool.settle()
    await pool.clear_kv_cache(0)
    await pool.clear_kv_cache(0)
    assert gang[0].names().count("generate_step") <= 2


async def test_message_of_another_epoch_is_not_taken_for_an_answer(pool: Pool, gang: FakeGang) -> None:
    """P11."""

    async def answers_of_before(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        stale = worker_pb2.SessionRequest(epoch=EPOCH - 1, seq=request.seq)
        await session.send(stale, unloaded=worker_pb2.Unloaded(freed_bytes=1))
        late = worker_pb2.SessionRequest(epoch=EPOCH, seq=request.seq - 1)
        await session.send(late, unloaded=worker_pb2.Unloaded(freed_bytes=2))
        await session.send(request, unloaded=worker_pb2.Unloaded(freed_bytes=4))

    await pool.control([worker_pb2.InitRequest()] * 3, Patience(5.0))
    gang[1].on["unload_model"] = answers_of_before
    assert await pool.unload() == 204


@pytest.mark.parametrize("failing", [0, 1])
async def test_error_of_a_plan_aborts_the_other_ranks_at_once(pool: Pool, gang: FakeGang, failing: int) -> None:
    """P11: the others wait in a collective; Abort frees them, and everything is over within 2 s."""
    for rank in gang.ranks:
        rank.on["generate_step"] = hangs
    gang[failing].on["generate_step"] = fails(worker_pb2.ERROR_KIND_OUT_OF_MEMORY, "no memory left")
    pool.send_plan(ONE_STEP)
    begun = time.monotonic()
    error = await fault_of(pool)
    assert time.monotonic() - begun < 2.0
    assert str(error) == f"plan 1 failed: rank {failing}: out_of_memory: no memory left"
    assert [rank.aborts[0].epoch for rank in gang.ranks] == [EPOCH] * 3
    with pytest.raises(PoolError, match="no memory left"):
        await pool.clear_kv_cache(0)
    assert not pool.may_send_plan


async def test_errors_of_all_ranks_are_attached(pool: Pool, gang: FakeGang) -> None:
    """W24: all ranks refuse the same plan; the first to say so wins and the others are there."""
    for rank in gang.ranks:
        rank.on["generate_step"] = fails(worker_pb2.ERROR_KIND_INVALID_PLAN, f"slot 99, says {rank.rank}")
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert [str(failure) for failure in error.ranks] == [
        f"rank {rank}: invalid_plan: slot 99, says {rank}" for rank in range(3)
    ]


async def test_session_that_ends_between_plans_is_a_fault_at_once(pool: Pool, gang: FakeGang) -> None:
    """P4."""
    gang[1].on["generate_step"] = ends_session
    pool.send_plan(ONE_STEP)
    begun = time.monotonic()
    error = await fault_of(pool)
    assert time.monotonic() - begun < STEP_SECONDS
    assert "rank 1: session closed before reply" in str(error)
    assert error.fault_kind == "session_closed"


async def test_different_checksum_is_a_fault(pool: Pool, gang: FakeGang) -> None:
    gang[2].checksum = lambda seq: 7 if seq == 3 else gang[0].checksum(seq)
    await send_plans(pool, 3)
    error = await fault_of(pool)
    assert isinstance(error.engine, ChecksumError)
    assert "after plan 3 rank 0 has checksum" in str(error)
    assert "rank 2 has 0x00000007" in str(error)


async def test_different_checksum_of_a_rank_that_is_ahead_is_a_fault_too(pool: Pool, gang: FakeGang) -> None:
    gang[0].on["generate_step"] = answers_after(0.1, run_plan)
    gang[1].checksum = lambda _seq: 1
    pool.send_plan(ONE_STEP)
    assert isinstance((await fault_of(pool)).engine, ChecksumError)


async def test_other_ranks_may_lag_by_16_plans_and_no_more(pool: Pool, gang: FakeGang) -> None:
    gang[1].ack_every = 1000
    for _ in range(17):
        await until(lambda: pool.may_send_plan)
        pool.send_plan(ONE_STEP)
        await until(lambda: len(pool.take_replies()) == 1)
    assert not pool.may_send_plan
    acknowledge = worker_pb2.GenerateStepOk(checksum=gang[1].checksum(1))
    await gang[1].sessions[0].send(gang[1].plans()[0], generate_step_ok=acknowledge)
    await until(lambda: pool.may_send_plan)


async def test_step_past_its_deadline_is_a_fault_that_names_who_lags_and_aborts(pool: Pool, gang: FakeGang) -> None:
    """P17."""
    gang[1].on["generate_step"] = is_stuck
    begun = time.monotonic()
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert STEP_SECONDS <= time.monotonic() - begun < STEP_SECONDS + 2.0
    assert isinstance(error.engine, StepDeadlineError)
    assert "plan 1 is late: not done by rank 1 past the step deadline" in str(error)
    assert all(rank.aborts for rank in gang.ranks)
    assert all(rank.pings for rank in gang.ranks)


async def test_hung_rank_that_answers_no_ping_is_named(pool: Pool, gang: FakeGang) -> None:
    """P17."""
    for rank in gang.ranks:
        rank.on["generate_step"] = hangs
    gang[2].named_rank = 7
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert "not done by rank 0, 1, 2" in str(error)
    assert "rank 2: " in str(error)


async def test_a_rank_that_answers_nothing_is_given_up_soon_after_the_step_deadline(pool: Pool, gang: FakeGang) -> None:
    """P17: it had the time for Ping before the deadline passed, and its Abort need not be waited for as others'."""
    gang[1].ignores_pings = gang[1].ignores_aborts = True
    gang[1].on["generate_step"] = is_stuck
    begun = time.monotonic()
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert isinstance(error.engine, StepDeadlineError)
    assert "rank 1: does not answer Ping" in str(error)
    assert STEP_SECONDS <= time.monotonic() - begun < STEP_SECONDS + TIMEOUTS.drain
    assert gang[0].aborts != []


async def test_busy_report_extends_the_step_deadline(pool: Pool, gang: FakeGang) -> None:
    """P17."""
    gang[0].busy = worker_pb2.Busy(what="capturing a graph", until=time.time() + 2.0)
    for rank in gang.ranks:
        rank.on["generate_step"] = answers_after(1.2, run_plan)
    pool.send_plan(ONE_STEP)
    await until(lambda: len(pool.take_replies()) == 1)
    assert pool.error is None
    assert gang[0].pings >= 1


async def test_busy_report_that_has_run_out_does_not_help(pool: Pool, gang: FakeGang) -> None:
    """P17."""
    gang[0].busy = worker_pb2.Busy(what="capturing a graph", until=time.time() + 0.8)
    gang[1].on["generate_step"] = hangs
    begun = time.monotonic()
    pool.send_plan(ONE_STEP)
    error = await fault_of(pool)
    assert isinstance(error.engine, StepDeadlineError)
    assert time.monotonic() - begun >= 0.8


async def test_abort_is_not_held_up_by_a_rank_that_does_not_confirm(pool: Pool, gang: FakeGang) -> None:
    """P11, P17: a drain takes at most its time, whatever a rank does."""

    async def never(request: object, context: object) -> worker_pb2.AbortResponse:
        await asyncio.Event().wait()
        raise AssertionError

    gang[1].Abort = never  # type: ignore[method-assign]
    begun = time.monotonic()
    await pool.abort("a test")
    assert time.monotonic() - begun < TIMEOUTS.drain + 0.5
    assert gang[0].aborts
    assert gang[2].aborts
