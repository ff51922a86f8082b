"""Control requests of the pool over real gRPC: every rank is drained, whatever fails."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from support.fake_rank import FakeGang, answers_after, ends_session, fails, fake_gang, hangs, is_stuck, until
from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import PoolError, SessionClosedError, WrongRankError
from tpmodel_worker.engine.exchange import ControlRequest, Patience
from tpmodel_worker.engine.plans import PlanTimes
from tpmodel_worker.engine.pool import Pool, PoolTimeouts
from tpmodel_worker.engine.session import Session

EPOCH = (1 << 32) | 1
TIMEOUTS = PoolTimeouts(drain=0.6, ping=0.5, clear=5.0, shutdown=0.5, close=0.2)
PATIENCE = Patience(5.0)
REQUESTS: list[ControlRequest] = [
    worker_pb2.InitRequest(),
    worker_pb2.LoadDenseShardRequest(),
    worker_pb2.ClearKvCacheRequest(),
    worker_pb2.UnloadModelRequest(),
]
NAMES = ["init", "load_dense_shard", "clear_kv_cache", "unload_model"]


@pytest.fixture
async def gang() -> AsyncIterator[FakeGang]:
    async with fake_gang(3) as ranks:
        yield ranks


@pytest.fixture
async def pool(gang: FakeGang) -> AsyncIterator[Pool]:
    made = Pool(
        gang.channels(),
        epoch=EPOCH,
        instance_id="engine-1",
        times=PlanTimes(5.0),
        wake=lambda: None,
        timeouts=TIMEOUTS,
    )
    yield made
    await made.close()


async def failure_of(pool: Pool, request: ControlRequest, *, collective: bool = False) -> PoolError:
    with pytest.raises(PoolError) as caught:
        await pool.control([request] * 3, PATIENCE, collective=collective)
    return caught.value


async def test_every_request_gets_one_reply_of_its_type_from_each_rank_in_order(pool: Pool, gang: FakeGang) -> None:
    """P1."""
    requests: list[ControlRequest] = [
        worker_pb2.InitRequest(rank=0),
        worker_pb2.NcclSanityCheckRequest(),
        worker_pb2.LoadDenseShardRequest(),
        worker_pb2.ClearKvCacheRequest(),
        worker_pb2.UnloadModelRequest(),
    ]
    kinds = []
    for request in requests:
        replies = await pool.control([request] * 3, PATIENCE)
        kinds.append({reply.WhichOneof("response") for reply in replies})
    assert kinds == [
        {"init_ok"},
        {"nccl_sanity_result"},
        {"load_dense_shard_ok"},
        {"kv_cache_cleared"},
        {"unloaded"},
    ]
    for rank in gang.ranks:
        assert [(request.epoch, request.seq) for request in rank.requests] == [(EPOCH, seq) for seq in range(1, 6)]
        assert [(session.epoch, session.instance_id) for session in rank.sessions] == [(EPOCH, "engine-1")]


async def test_unknown_op_is_an_error_and_the_session_lives_on(pool: Pool, gang: FakeGang) -> None:
    """P1."""
    healthy = gang[1].on["unload_model"]
    gang[1].on["unload_model"] = fails(worker_pb2.ERROR_KIND_UNKNOWN_OP, "what is unload_model?")
    error = await failure_of(pool, worker_pb2.UnloadModelRequest())
    assert str(error) == "unload_model failed: rank 1: unknown_op: what is unload_model?"
    gang[1].on["unload_model"] = healthy
    assert await pool.unload() == 300


@pytest.mark.parametrize("request_", REQUESTS, ids=NAMES)
async def test_session_that_ends_early_is_reported_at_once(
    pool: Pool, gang: FakeGang, request_: ControlRequest
) -> None:
    """P4."""
    gang[1].on[_name(request_)] = ends_session
    begun = time.monotonic()
    error = await failure_of(pool, request_)
    assert time.monotonic() - begun < 2.0
    assert "rank 1: session closed before reply" in str(error)


async def test_rank_that_dies_is_reported_at_once(pool: Pool, gang: FakeGang) -> None:
    """P4, W20: what kills a rank's process does not hurt the engine."""
    gang[2].on["init"] = hangs
    waiting = asyncio.create_task(failure_of(pool, worker_pb2.InitRequest()))
    await until(lambda: gang[2].names() == ["init"])
    begun = time.monotonic()
    await gang[2].stop()
    error = await waiting
    assert time.monotonic() - begun < 2.0
    assert "rank 2: session closed before reply (" in str(error)


async def test_ping_names_the_rank_and_answers_while_the_session_is_busy(pool: Pool, gang: FakeGang) -> None:
    """P5."""
    gang[1].on["init"] = hangs
    init = asyncio.create_task(pool.control([worker_pb2.InitRequest()] * 3, PATIENCE))
    await until(lambda: gang[1].names() == ["init"])
    assert (await pool.ping(1)).rank == 1
    await pool.abort("enough")
    with pytest.raises(PoolError):
        await init


async def test_ping_of_a_wrong_rank_fails(pool: Pool, gang: FakeGang) -> None:
    """P5."""
    gang[1].named_rank = 2
    with pytest.raises(WrongRankError, match="should be rank 1 but is rank 2"):
        await pool.ping(1)


async def test_ping_of_something_else_fails(gang: FakeGang) -> None:
    """P5: a server that is no rank does not pass for one."""
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gang[0].port = port
    pool = Pool(
        gang.channels(), epoch=EPOCH, instance_id="e", times=PlanTimes(5.0), wake=lambda: None, timeouts=TIMEOUTS
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await pool.ping(0)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await pool.close()
    await server.stop(grace=None)


async def test_init_reaches_all_ranks_before_any_has_answered(pool: Pool, gang: FakeGang) -> None:
    """P6: the ranks must join at the same time."""
    joined: list[int] = []
    everyone = asyncio.Event()

    async def join(rank, session, request) -> None:
        joined.append(rank.rank)
        if len(joined) == 3:
            everyone.set()
        await everyone.wait()
        await session.send(request, init_ok=worker_pb2.InitOk())

    for rank in gang.ranks:
        rank.on["init"] = join
    requests = [worker_pb2.InitRequest(rank=rank, world_size=3, rendezvous_id="one") for rank in range(3)]
    await pool.control(requests, PATIENCE, collective=True)
    assert [rank.requests[0].init.rank for rank in gang.ranks] == [0, 1, 2]
    assert {rank.requests[0].init.rendezvous_id for rank in gang.ranks} == {"one"}


async def test_failed_init_names_rank_and_kind_and_releases_the_ranks_that_wait(pool: Pool, gang: FakeGang) -> None:
    """P6, P7: those who wait for the failed rank are aborted, and drained."""
    gang[0].on["init"] = hangs
    gang[1].on["init"] = fails(worker_pb2.ERROR_KIND_COMMUNICATOR, "no such device")
    gang[2].on["init"] = hangs
    begun = time.monotonic()
    error = await failure_of(pool, worker_pb2.InitRequest(), collective=True)
    assert time.monotonic() - begun < 2.0
    assert [failure.rank for failure in error.ranks] == [0, 1, 2]
    assert "rank 1: communicator: no such device" in str(error)
    assert all(rank.aborts and rank.aborts[0].epoch == EPOCH for rank in gang.ranks)


@pytest.mark.parametrize("request_", REQUESTS, ids=NAMES)
async def test_failing_request_still_drains_every_rank(pool: Pool, gang: FakeGang, request_: ControlRequest) -> None:
    """P7: the next request's replies are its own, and W24: every rank's account is there."""
    name = _name(request_)
    healthy = gang[0].on[name]
    gang[0].on[name] = fails(worker_pb2.ERROR_KIND_INTERNAL, "first")
    gang[1].on[name] = answers_after(0.3, fails(worker_pb2.ERROR_KIND_OUT_OF_MEMORY, "second"))
    gang[2].on[name] = answers_after(0.2, healthy)
    error = await failure_of(pool, request_)
    assert str(error) == f"{name} failed: rank 0: internal: first; rank 1: out_of_memory: second"
    gang[0].on[name] = gang[1].on[name] = gang[2].on[name] = healthy
    replies = await pool.control([request_] * 3, PATIENCE)
    assert [reply.seq for reply in replies] == [2, 2, 2]


async def test_answer_of_another_type_is_an_error(pool: Pool, gang: FakeGang) -> None:
    """P1, W24: a reply that is not the one that was due does not count as one."""
    gang[1].on["unload_model"] = gang[1].on["init"]
    error = await failure_of(pool, worker_pb2.UnloadModelRequest())
    assert str(error) == "unload_model failed: rank 1: answered unload_model with init_ok"


async def test_reply_that_never_comes_is_an_error_of_engine_and_rank(
    pool: Pool, gang: FakeGang, caplog: pytest.LogCaptureFixture
) -> None:
    """W24, P12: the engine's own failure comes first, and is logged with its chain."""
    gang[1].on["unload_model"] = is_stuck
    with caplog.at_level(logging.WARNING), pytest.raises(PoolError) as caught:
        await pool.control([worker_pb2.UnloadModelRequest()] * 3, Patience(0.2))
    text = str(caught.value)
    assert text.startswith("unload_model failed: engine: no final reply to unload_model in time from rank 1; rank 1: ")
    logged = [record for record in caplog.records if record.levelno == logging.WARNING and record.exc_info]
    assert [type(record.exc_info[1]) for record in logged if record.exc_info] == [TimeoutError]


async def test_sanity_check_looks_at_every_rank(pool: Pool, gang: FakeGang) -> None:
    """P8."""

    async def alone(rank, session, request) -> None:
        await session.send(request, nccl_sanity_result=worker_pb2.NcclSanityResult(observed_sum=1))

    gang[2].on["nccl_sanity_check"] = alone
    with pytest.raises(PoolError) as caught:
        await pool.sanity_check(PATIENCE)
    assert str(caught.value) == (
        "nccl_sanity_check failed: engine: an all-reduce of ones should give 3 on every rank; "
        "rank 2: observed a sum of 1"
    )


async def test_sanity_check_before_init_fails(pool: Pool, gang: FakeGang) -> None:
    """P8."""
    for rank in gang.ranks:
        rank.on["nccl_sanity_check"] = fails(worker_pb2.ERROR_KIND_NCCL_NOT_INITIALISED, "Init comes first")
    with pytest.raises(PoolError) as caught:
        await pool.sanity_check(PATIENCE)
    assert caught.value.kinds == {worker_pb2.ERROR_KIND_NCCL_NOT_INITIALISED}
    assert {failure.rank for failure in caught.value.ranks} == {0, 1, 2}


async def test_send_that_fails_in_the_fan_out_leaves_no_rank_undrained(
    pool: Pool, gang: FakeGang, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P13, and P12: both halves are reported, engine first; ranks before and after the failure are drained."""
    send = Session.send

    def broken_send(session: Session, request: bytes) -> None:
        if session.rank == 1:
            raise SessionClosedError("the session of rank 1 has ended")
        send(session, request)

    monkeypatch.setattr(Session, "send", broken_send)
    gang[0].on["unload_model"] = fails(worker_pb2.ERROR_KIND_INTERNAL, "could not free")
    gang[2].on["unload_model"] = fails(worker_pb2.ERROR_KIND_INTERNAL, "could not free either")
    with caplog.at_level(logging.WARNING):
        error = await failure_of(pool, worker_pb2.UnloadModelRequest())
    assert str(error) == (
        "unload_model failed: engine: the session of rank 1 has ended; rank 0: internal: could not free; "
        "rank 1: session closed before reply; rank 2: internal: could not free either"
    )
    chains = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert any(isinstance(chain, SessionClosedError) for chain in chains)


async def test_session_lost_after_its_reply_is_not_overlooked(pool: Pool, gang: FakeGang) -> None:
    """W21: a request that ends with a rank gone has not succeeded."""
    gang[0].on["init"] = answers_after(0.3, gang[0].on["init"])

    async def answers_and_goes(rank, session, request) -> None:
        await session.send(request, init_ok=worker_pb2.InitOk())
        await ends_session(rank, session, request)

    gang[1].on["init"] = answers_and_goes
    error = await failure_of(pool, worker_pb2.InitRequest())
    assert str(error) == "init failed: rank 1: session closed"


async def test_load_may_take_long_while_any_rank_makes_progress(pool: Pool, gang: FakeGang) -> None:
    async def slow(rank, session, request) -> None:
        for done in range(5):
            await asyncio.sleep(0.15)
            progress = worker_pb2.Progress(what="weights", done_bytes=done, total_bytes=5)
            await session.send(request, progress=progress)
        await session.send(request, load_dense_shard_ok=worker_pb2.LoadDenseShardOk())

    gang[1].on["load_dense_shard"] = slow
    gang[2].on["load_dense_shard"] = answers_after(0.6, gang[2].on["load_dense_shard"])
    seen: list[tuple[int, int]] = []
    await pool.control(
        [worker_pb2.LoadDenseShardRequest()] * 3,
        Patience(0.4, progress_counts=True),
        on_progress=lambda rank, progress: seen.append((rank, progress.done_bytes)),
    )
    assert [done for rank, done in seen if rank == 1] == [0, 1, 2, 3, 4]


async def test_load_without_progress_ends(pool: Pool, gang: FakeGang) -> None:
    gang[1].on["load_dense_shard"] = hangs
    with pytest.raises(PoolError) as caught:
        await pool.control([worker_pb2.LoadDenseShardRequest()] * 3, Patience(0.2, progress_counts=True))
    assert isinstance(caught.value.engine, TimeoutError)
    assert gang[1].aborts


async def test_shutdown_says_bye_to_every_rank_and_is_idempotent(pool: Pool, gang: FakeGang) -> None:
    """P16."""
    await asyncio.gather(pool.shutdown(), pool.shutdown())
    await pool.shutdown()
    assert [rank.names() for rank in gang.ranks] == [["shutdown"]] * 3
    assert not any(rank.aborts for rank in gang.ranks)


async def test_shutdown_waits_for_a_stuck_rank_only_so_long(pool: Pool, gang: FakeGang) -> None:
    """P16."""
    gang[1].on["shutdown"] = is_stuck
    begun = time.monotonic()
    await pool.shutdown()
    assert time.monotonic() - begun < 3.0
    assert gang[0].names() == gang[2].names() == ["shutdown"]


async def test_second_session_of_an_epoch_is_refused_with_the_reason(pool: Pool, gang: FakeGang) -> None:
    await pool.control([worker_pb2.InitRequest()] * 3, PATIENCE)
    second = Pool(
        gang.channels(), epoch=EPOCH, instance_id="engine-1", times=PlanTimes(5.0), wake=lambda: None, timeouts=TIMEOUTS
    )
    error = await failure_of(second, worker_pb2.InitRequest())
    assert f"ALREADY_EXISTS: epoch {EPOCH} has a session already" in str(error)
    await second.close()


def _name(request: ControlRequest) -> str:
    return NAMES[[type(known) for known in REQUESTS].index(type(request))]
