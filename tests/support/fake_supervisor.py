"""A supervisor without processes: says what a test tells it to, and does to fake ranks what it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from support.fake_rank import TOKEN, FakeGang, FakeRank
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import Expected, TokenInterceptor


class FakeSupervisor(worker_pb2_grpc.SupervisorServiceServicer):
    """SupervisorService of the pod of a FakeGang."""

    def __init__(self, gang: FakeGang) -> None:
        self.gang = gang
        self.port = 0
        self.kills: list[worker_pb2.KillRequest] = []
        self.watches = 0
        self.refuses_watches = False
        self.events: list[worker_pb2.WatchResponse] = []
        """The first ones of every watch."""
        self._watchers: list[asyncio.Queue[worker_pb2.WatchResponse]] = []
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Serves on a free port."""
        self._server = grpc.aio.server(interceptors=[TokenInterceptor(Expected.gang_token(TOKEN))])
        worker_pb2_grpc.add_SupervisorServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        """Ends at once."""
        if self._server is not None:
            await self._server.stop(grace=None)

    def registration(self, *, attempt: int, rendezvous: str = "127.0.0.1:1") -> worker_pb2.RegisterRequest:
        """What it says of the ranks as they are now."""
        request = self.gang.registration(attempt=attempt, rendezvous=rendezvous)
        request.supervisor_port = self.port
        return request

    def tell_exit(self, rank: FakeRank, *, signal: int = 9) -> None:
        """The end of a rank's present process, to everybody who watches."""
        exited = worker_pb2.RankExited(rank=rank.rank, pid=rank.endpoint.pid, signal=signal)
        for queue in self._watchers:
            queue.put_nowait(worker_pb2.WatchResponse(exited=exited))

    async def Watch(self, request: worker_pb2.WatchRequest, context: Any) -> AsyncIterator[worker_pb2.WatchResponse]:  # noqa: N802
        self.watches += 1
        if self.refuses_watches:
            await asyncio.Event().wait()
        await context.send_initial_metadata(())
        queue: asyncio.Queue[worker_pb2.WatchResponse] = asyncio.Queue()
        self._watchers.append(queue)
        for event in self.events:
            yield event
        while True:
            yield await queue.get()

    async def Kill(self, request: worker_pb2.KillRequest, context: Any) -> worker_pb2.KillResponse:  # noqa: N802
        self.kills.append(request)
        return worker_pb2.KillResponse(killed=True)

    async def Respawn(self, request: worker_pb2.RespawnRequest, context: Any) -> worker_pb2.RespawnResponse:  # noqa: N802
        raise NotImplementedError("dead ranks come back by themselves, hung ones after Kill")

    async def GetSupervisorStatus(  # noqa: N802
        self, request: worker_pb2.GetSupervisorStatusRequest, context: Any
    ) -> worker_pb2.GetSupervisorStatusResponse:
        return worker_pb2.GetSupervisorStatusResponse(pod="local")

    async def ReleaseMemory(  # noqa: N802
        self, request: worker_pb2.ReleaseMemoryRequest, context: Any
    ) -> worker_pb2.ReleaseMemoryResponse:
        return worker_pb2.ReleaseMemoryResponse()


@asynccontextmanager
async def fake_supervisor(gang: FakeGang) -> AsyncIterator[FakeSupervisor]:
    """A running one."""
    supervisor = FakeSupervisor(gang)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()
