"""Real rank processes and the engine's side of their sessions, for tests of the rank alone."""

from __future__ import annotations

import asyncio
import itertools
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from support.rank_link import RankLink
from tpmodel.v1 import worker_pb2 as pb
from tpmodel.v1 import worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.settings import ServeSettings

_START_SECONDS = 120.0
REPLY_SECONDS = 30.0
_RUN_RANK = """
import sys
from tpmodel_worker.rank.main import run_rank
from tpmodel_worker.settings import ServeSettings
run_rank(ServeSettings.from_json(sys.argv[1]), int(sys.argv[2]))
"""


class RankGang:
    """World-size rank processes, their supervisor's link, and a rendezvous store."""

    def __init__(self, folder: Path, world_size: int, *, device: str = "cpu") -> None:
        assert device in ("cpu", "cuda")
        self.world_size = world_size
        self.token = secrets.token_hex(8)
        self.settings = ServeSettings(
            model_path="",
            model_id="test",
            served_name="test",
            world_size=world_size,
            device="cuda" if device == "cuda" else "cpu",
            token=self.token,
            attempt=0,  # its ranks take epochs from 1 on
            runtime_dir=str(folder),
            log_format="text",
        )
        self.link = RankLink(self.settings.rank_socket, instance_id="")
        self._store = start_store("127.0.0.1")
        self.rendezvous = f"127.0.0.1:{self._store.port}"
        self.epochs = itertools.count(1)
        self.processes = [self._spawn(rank) for rank in range(world_size)]

    def _spawn(self, rank: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", _RUN_RANK, self.settings.to_json(), str(rank)]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})

    @property
    def ports(self) -> dict[int, int]:
        """The ranks' ports, once all have said hello."""
        return self.link.wait_for_ports(self.world_size, _START_SECONDS)

    def kill(self, rank: int) -> None:
        """SIGKILLs a rank."""
        self.processes[rank].send_signal(signal.SIGKILL)
        self.processes[rank].wait(10)

    def respawn(self, rank: int) -> None:
        """Replaces a rank that has ended."""
        self.processes[rank].wait(10)
        self.link.forget(rank)
        self.processes[rank] = self._spawn(rank)

    def close(self) -> None:
        """Ends the link, and with it the ranks."""
        self.link.close()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


class RankSession:
    """One session, as the engine opens it."""

    def __init__(
        self, gang: RankGang, rank: int, epoch: int, *, instance: str = "engine", options: Sequence[Any] = ()
    ) -> None:
        self.rank = rank
        self.epoch = epoch
        self.seq = 0
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{gang.ports[rank]}", options=options)
        self.metadata = token_metadata(gang.token)
        stub: Any = worker_pb2_grpc.WorkerServiceStub(self.channel)
        self.stub: worker_pb2_grpc.WorkerServiceAsyncStub = stub
        opening = (("tpmodel-epoch", str(epoch)), ("tpmodel-instance", instance))
        self.call: Any = self.stub.Session(metadata=(*self.metadata, *opening))

    async def opened(self) -> None:
        """Returns once the rank has accepted the session."""
        await asyncio.wait_for(self.call.initial_metadata(), REPLY_SECONDS)

    async def send(self, **request: Any) -> int:
        """Sends one request with the next seq; returns that."""
        self.seq += 1
        await self.call.write(pb.SessionRequest(epoch=self.epoch, seq=self.seq, **request))
        return self.seq

    async def send_raw(self, request: pb.SessionRequest) -> None:
        """Sends a request as it is."""
        await self.call.write(request)

    async def receive(self, timeout: float = REPLY_SECONDS) -> pb.SessionResponse:
        """The next reply that is no progress."""
        while True:
            response = await asyncio.wait_for(self.call.read(), timeout)
            assert isinstance(response, pb.SessionResponse), f"rank {self.rank}: the session has ended"
            if not response.HasField("progress"):
                return response

    async def control(self, timeout: float = REPLY_SECONDS, **request: Any) -> pb.SessionResponse:
        """Sends a request and waits for its final reply."""
        seq = await self.send(**request)
        response = await self.receive(timeout)
        assert (response.epoch, response.seq) == (self.epoch, seq)
        return response

    async def abort(self, timeout: float = 5.0) -> None:
        """Aborts the session's epoch on its rank."""
        request = pb.AbortRequest(epoch=self.epoch, reason="test")
        await self.stub.Abort(request, metadata=self.metadata, timeout=timeout)

    async def close(self) -> None:
        """Cancels the session."""
        self.call.cancel()
        await self.channel.close()


class World:
    """Sessions of one epoch to all ranks."""

    def __init__(self, gang: RankGang, epoch: int) -> None:
        self.gang = gang
        self.epoch = epoch
        self.sessions = [RankSession(gang, rank, epoch) for rank in range(gang.world_size)]

    async def control(self, timeout: float = REPLY_SECONDS, **request: Any) -> list[pb.SessionResponse]:
        """The same control request to all ranks at once; their final replies by rank."""
        return await asyncio.gather(*(session.control(timeout, **request) for session in self.sessions))

    def init_request(self, rank: int, **changes: Any) -> pb.InitRequest:
        """Init of one rank."""
        request = pb.InitRequest(
            rank=rank,
            world_size=self.gang.world_size,
            rendezvous=self.gang.rendezvous,
            rendezvous_id=f"epoch {self.epoch}",
            timeout_seconds=20.0,
            pods=["local"] * self.gang.world_size,
            instance_id="engine",
            communicator="auto",
        )
        request.MergeFrom(pb.InitRequest(**changes))
        return request

    async def init(self) -> list[pb.SessionResponse]:
        """Builds the world."""
        return await asyncio.gather(
            *(session.control(init=self.init_request(session.rank)) for session in self.sessions)
        )

    async def build(
        self, load: pb.LoadDenseShardRequest, *, num_blocks: int = 64, state_snapshots: int = 0
    ) -> list[pb.SessionResponse]:
        """Init, load and clear; the replies to load. Fails on any error."""
        await _succeed(self.init(), "init_ok")
        loaded = await _succeed(self.control(load_dense_shard=load), "load_dense_shard_ok")
        clear = pb.ClearKvCacheRequest(num_blocks=num_blocks, state_snapshots=state_snapshots)
        await _succeed(self.control(clear_kv_cache=clear), "kv_cache_cleared")
        return loaded

    async def plan(self, plan: pb.GenerateStepRequest) -> int:
        """Sends a plan to every rank; returns its seq."""
        return (await asyncio.gather(*(session.send(generate_step=plan) for session in self.sessions)))[0]

    async def settle(self) -> list[pb.SessionResponse]:
        """Settles: every rank's reply to the settling plan; replies to plans before it are skipped."""
        seq = await self.plan(pb.GenerateStepRequest(steps=0, ack_now=True))

        async def reply(session: RankSession) -> pb.SessionResponse:
            while (response := await session.receive()).seq < seq:
                pass
            return response

        return await asyncio.gather(*(reply(session) for session in self.sessions))

    async def abort(self, timeout: float = 5.0) -> None:
        """Aborts the epoch on every rank."""
        await asyncio.gather(*(session.abort(timeout) for session in self.sessions))

    async def close(self) -> None:
        """Closes every session."""
        await asyncio.gather(*(session.close() for session in self.sessions))


@asynccontextmanager
async def new_world(gang: RankGang) -> AsyncIterator[World]:
    """Sessions of the gang's next epoch."""
    world = World(gang, next(gang.epochs))
    try:
        yield world
    finally:
        await world.close()


async def _succeed(replies: Any, field: str) -> list[pb.SessionResponse]:
    responses: list[pb.SessionResponse] = await replies
    for rank, response in enumerate(responses):
        assert response.WhichOneof("response") == field, f"rank {rank}: {response}"
    return responses


def admission(slot: int, token_ids: Sequence[int], *, max_tokens: int, **changes: Any) -> pb.Admission:
    """A greedy sequence."""
    sampling = pb.SlotSampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, max_tokens=max_tokens, logprobs=-1)
    sampling.MergeFrom(changes.pop("sampling", pb.SlotSampling()))
    fields: dict[str, Any] = {"prompt_length": len(token_ids)} | changes
    return pb.Admission(slot=slot, token_ids=token_ids, sampling=sampling, **fields)
