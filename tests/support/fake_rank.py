"""A rank without a model that speaks the real protocol over real gRPC, and misbehaves as a test tells it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import grpc

from support.simulated_rank import SimulatedRank
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.engine.session import RankChannel, RankEndpoint

TOKEN = "gang-secret"

Behaviour = Callable[["FakeRank", "FakeSession", worker_pb2.SessionRequest], Awaitable[None]]


class EndSessionError(Exception):
    """Raised by a behaviour: the rank ends the stream without an answer."""


@dataclass
class FakeSession:
    """One stream of a fake rank."""

    epoch: int
    instance_id: str
    context: grpc.aio.ServicerContext[Any, Any]
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the epoch was aborted."""
    unacknowledged: int = 0

    async def send(self, request: worker_pb2.SessionRequest, **response: Any) -> None:
        """Answers a request; response: the oneof's field."""
        await self.context.write(worker_pb2.SessionResponse(epoch=request.epoch, seq=request.seq, **response))


class FakeRank(worker_pb2_grpc.WorkerServiceServicer):
    """Answers everything as a healthy rank would; `on` replaces what it does for a kind of request."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.named_rank = rank
        """What Ping and GetStatus say."""
        self.on: dict[str, Behaviour] = dict(HEALTHY)
        self.requests: list[worker_pb2.SessionRequest] = []
        self.sessions: list[FakeSession] = []
        self.aborts: list[worker_pb2.AbortRequest] = []
        self.ignores_aborts = False
        self.ignores_pings = False
        self.pings = 0
        self.busy: worker_pb2.Busy | None = None
        self.highest_epoch = 0
        self.kv_blocks = 64
        self.state_bytes = 0
        self.state_snapshots = 0
        self.ack_every = 1
        """Plans between two answers of a rank other than 0."""
        self.checksum: Callable[[int], int] = lambda seq: seq * 2654435761 % 2**32
        self.model: SimulatedRank | None = None
        self.port = 0
        self.pid = 1000 + rank
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serves on a free port."""
        options = [("grpc.http2.min_ping_interval_without_data_ms", 1000), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(interceptors=[TokenInterceptor(Expected.gang_token(TOKEN))], options=options)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        """Ends at once, as a killed process."""
        if self._server is not None:
            await self._server.stop(grace=None)
            self._server = None

    async def restart(self) -> None:
        """Another process in its place, which knows nothing of what was before."""
        await self.stop()
        self.port = 0
        self.pid += 100
        self.on, self.ignores_aborts = dict(HEALTHY), False
        self.sessions, self.requests, self.model, self.highest_epoch = [], [], None, 0
        await self.start()

    @property
    def endpoint(self) -> RankEndpoint:
        """Where the engine finds it."""
        return RankEndpoint(self.rank, "127.0.0.1", self.port, "local", self.pid)

    def names(self) -> list[str]:
        """The kinds of all requests received, in order."""
        return [request.WhichOneof("request") or "" for request in self.requests]

    def plans(self) -> list[worker_pb2.SessionRequest]:
        """The plans received."""
        return [request for request in self.requests if request.HasField("generate_step")]

    # A coroutine, so that a behaviour may end the stream.
    async def Session(  # noqa: N802 # pyright: ignore[reportIncompatibleMethodOverride]
        self, request_iterator: AsyncIterator[worker_pb2.SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        metadata = dict(cast("Sequence[tuple[str, str]]", context.invocation_metadata() or ()))
        session = FakeSession(int(metadata["tpmodel-epoch"]), metadata["tpmodel-instance"], context)
        if session.epoch in {other.epoch for other in self.sessions}:
            await context.abort(grpc.StatusCode.ALREADY_EXISTS, f"epoch {session.epoch} has a session already")
        self.highest_epoch = max(self.highest_epoch, session.epoch)
        self.sessions.append(session)
        try:
            async for request in request_iterator:
                self.requests.append(request)
                await self.on[request.WhichOneof("request") or ""](self, session, request)
        except EndSessionError:
            return

    async def Ping(self, request: worker_pb2.PingRequest, context: Any) -> worker_pb2.PingResponse:  # noqa: N802
        self.pings += 1
        if self.ignores_pings:
            await asyncio.Event().wait()
        return worker_pb2.PingResponse(rank=self.named_rank, epoch=self.highest_epoch, busy=self.busy)

    async def GetStatus(  # noqa: N802
        self, request: worker_pb2.GetStatusRequest, context: Any
    ) -> worker_pb2.GetStatusResponse:
        return worker_pb2.GetStatusResponse(rank=self.named_rank, epoch=self.highest_epoch, device="fake", state="idle")

    async def AwaitKvTransfer(  # noqa: N802
        self, request: worker_pb2.AwaitKvTransferRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.AwaitKvTransferResponse:
        await context.abort(grpc.StatusCode.NOT_FOUND, "no KV moves here")
        raise AssertionError("abort raises")

    async def CancelKvTransfer(  # noqa: N802
        self, request: worker_pb2.CancelKvTransferRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> worker_pb2.CancelKvTransferResponse:
        return worker_pb2.CancelKvTransferResponse()

    async def Abort(self, request: worker_pb2.AbortRequest, context: Any) -> worker_pb2.AbortResponse:  # noqa: N802
        self.aborts.append(request)
        if self.ignores_aborts:
            await asyncio.Event().wait()
        self.highest_epoch = max(self.highest_epoch, request.epoch)
        for session in self.sessions:
            if session.epoch <= request.epoch:
                session.left.set()
        return worker_pb2.AbortResponse(epoch=request.epoch)


# ------------------------------------------------------------------------------------ healthy answers


async def _init(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    await session.send(request, init_ok=worker_pb2.InitOk(communicator="fake", seconds=0.01))


async def _sanity(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    await session.send(request, nccl_sanity_result=worker_pb2.NcclSanityResult(observed_sum=rank.world_size))


async def _load(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    for done in (0, 50, 100):
        await session.send(request, progress=worker_pb2.Progress(what="weights", done_bytes=done, total_bytes=100))
    loaded = worker_pb2.LoadDenseShardOk(
        bytes=100,
        digest=7,
        kv_blocks_available=rank.kv_blocks,
        kv_block_bytes=512,
        state_bytes=rank.state_bytes,
        state_snapshots_available=rank.state_snapshots,
        weight_version=0,
    )
    await session.send(request, load_dense_shard_ok=loaded)


async def _find_weights(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    assert request.weight_update.HasField("find_persisted"), "the only step of an update that a fake rank takes"
    await session.send(request, weight_update_ok=worker_pb2.WeightUpdateOk())


async def _clear(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    num_blocks = request.clear_kv_cache.num_blocks or rank.kv_blocks
    if rank.rank == 0:
        rank.model = SimulatedRank(
            num_blocks=num_blocks, block_size=16, slots=8, max_step_tokens=2048, max_len=1024, vocabulary=50
        )
    await session.send(request, kv_cache_cleared=worker_pb2.KvCacheCleared(num_blocks=num_blocks))


async def _unload(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    await session.send(request, unloaded=worker_pb2.Unloaded(freed_bytes=100))


async def _shutdown(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    await session.send(request, bye=worker_pb2.Bye())


async def run_plan(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    """Rank 0 answers every step (with tokens, once the KV cache was made), others now and then."""
    plan = request.generate_step
    checksum = rank.checksum(request.seq)
    if rank.rank == 0:
        replies = [worker_pb2.GenerateStepOk(step=step) for step in range(max(plan.steps, 1))]
        if rank.model is not None:
            replies = rank.model.execute(plan)
        for reply in replies:
            reply.checksum = checksum
            reply.seconds = 0.001
            await session.send(request, generate_step_ok=reply)
        return
    session.unacknowledged += 1
    if plan.ack_now or session.unacknowledged >= rank.ack_every:
        session.unacknowledged = 0
        reply = worker_pb2.GenerateStepOk(step=max(plan.steps, 1) - 1, checksum=checksum)
        await session.send(request, generate_step_ok=reply)


HEALTHY: dict[str, Behaviour] = {
    "init": _init,
    "nccl_sanity_check": _sanity,
    "weight_update": _find_weights,
    "load_dense_shard": _load,
    "clear_kv_cache": _clear,
    "unload_model": _unload,
    "shutdown": _shutdown,
    "generate_step": run_plan,
}


# ----------------------------------------------------------------------------------------- misbehaviour


def fails(kind: worker_pb2.ErrorKind.ValueType, message: str) -> Behaviour:
    """Answers with an Error."""

    async def answer(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        await session.send(request, error=worker_pb2.Error(kind=kind, message=message))

    return answer


async def ends_session(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    """Ends the stream instead of an answer."""
    raise EndSessionError


async def hangs(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    """Waits as in a collective that nobody joins, until the epoch is aborted."""
    await session.left.wait()
    error = worker_pb2.Error(kind=worker_pb2.ERROR_KIND_ABORTED, message="the epoch was aborted")
    await session.send(request, error=error)


async def is_stuck(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
    """Never answers, aborted or not."""
    await asyncio.Event().wait()


def answers_after(seconds: float, then: Behaviour) -> Behaviour:
    """Takes its time."""

    async def answer(rank: FakeRank, session: FakeSession, request: worker_pb2.SessionRequest) -> None:
        await asyncio.sleep(seconds)
        await then(rank, session, request)

    return answer


# -------------------------------------------------------------------------------------------- gangs


class FakeGang:
    """Fake ranks of one world."""

    def __init__(self, world_size: int) -> None:
        self.ranks = [FakeRank(rank, world_size) for rank in range(world_size)]

    def __getitem__(self, rank: int) -> FakeRank:
        return self.ranks[rank]

    def channels(self) -> list[RankChannel]:
        """New channels to all ranks."""
        return [RankChannel(rank.endpoint, TOKEN) for rank in self.ranks]

    def registration(
        self,
        *,
        attempt: int = 1,
        pod_uid: str = "local",
        without: Sequence[int] = (),
        rendezvous: str = "127.0.0.1:1",
    ) -> Any:
        """What the supervisor of these ranks says."""
        return worker_pb2.RegisterRequest(
            pod_uid=pod_uid,
            address="127.0.0.1",
            attempt=attempt,
            ranks=[
                worker_pb2.RankAddress(rank=rank.rank, pid=rank.pid, port=rank.port)
                for rank in self.ranks
                if rank.rank not in without
            ],
            rendezvous=rendezvous,
        )


@asynccontextmanager
async def fake_gang(world_size: int) -> AsyncIterator[FakeGang]:
    """Running fake ranks."""
    gang = FakeGang(world_size)
    for rank in gang.ranks:
        await rank.start()
    try:
        yield gang
    finally:
        for rank in gang.ranks:
            await rank.stop()


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits until the condition holds; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.005)
