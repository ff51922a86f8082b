"""Connections of a rank that carry nothing: they last, until one end does not answer any more."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import grpc
import pytest

from support.rank_gang import RankGang, RankSession
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.session import RankChannel, RankEndpoint

# A server answers the third ping that came too soon after another with the end of the connection.
PING_SECONDS = 1.1
PINGS = 5
IMPATIENT = (
    ("grpc.keepalive_time_ms", int(1000 * PING_SECONDS)),
    ("grpc.keepalive_timeout_ms", 1000),
    ("grpc.http2.ping_timeout_ms", 1000),
    ("grpc.http2.max_pings_without_data", 0),
)


async def test_an_idle_session_lives_past_many_keepalive_pings(tmp_path: Path) -> None:
    gang = RankGang(tmp_path, 1)
    try:
        session = RankSession(gang, 0, 1, options=IMPATIENT)
        await session.opened()
        await asyncio.sleep(PINGS * PING_SECONDS)
        reply = await session.control(nccl_sanity_check=pb.NcclSanityCheckRequest())
        assert reply.error.kind == pb.ERROR_KIND_NCCL_NOT_INITIALISED
        await session.close()
    finally:
        gang.close()


async def test_the_engine_finds_a_stopped_rank_without_asking_it_anything(tmp_path: Path) -> None:
    """P17: the keepalive of the engine's own channel options."""
    gang = RankGang(tmp_path, 1)
    try:
        channel = RankChannel(RankEndpoint(0, "127.0.0.1", gang.ports[0]), gang.token)
        opening = (*token_metadata(gang.token), ("tpmodel-epoch", "1"), ("tpmodel-instance", "engine"))
        call = channel.channel.stream_stream("/tpmodel.v1.WorkerService/Session")(metadata=opening)
        await call.initial_metadata()
        gang.processes[0].send_signal(signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call.read(), 30)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - started < 20
        await channel.close()
    finally:
        os.kill(gang.processes[0].pid, signal.SIGCONT)
        gang.close()
