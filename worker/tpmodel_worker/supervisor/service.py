"""SupervisorService: how the engine watches, ends and replaces the rank processes of this pod."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import NoReturn, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker import attempts
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.memory import ArenaError, MemoryHolder
from tpmodel_worker.supervisor.processes import Process, ProcessTable
from tpmodel_worker.supervisor.spares import SPARE
from tpmodel_worker.supervisor.status import process_statuses

_SERVICE = "tpmodel.v1.SupervisorService"
_HEALTH_SERVICE = "grpc.health.v1.Health"
_OPTIONS = (
    # The engine's keepalive asks every few seconds, also while nothing happens that a watch would tell of.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
)
# Events that a watcher may lag behind before its stream is ended.
_WATCH_QUEUE = 1024


class StaleEpochError(Exception):
    """The epoch is older than one that was asked for before."""


class RespawnError(Exception):
    """The rank could not be replaced."""


class Ranks(Protocol):
    """What the service needs of the pod's ranks."""

    def rank_of(self, process: Process) -> int | None:
        """Which rank a process is, None for other processes."""
        ...

    async def respawn(self, rank: int, epoch: int) -> Process:
        """Replaces a rank; raises KeyError, StaleEpochError or RespawnError."""
        ...

    async def kill(self, rank: int, pid: int) -> bool:
        """SIGKILLs a rank whose pid is the given one; whether it was; raises KeyError."""
        ...


class SupervisorServicer(worker_pb2_grpc.SupervisorServiceServicer):
    """Implements the service over the pod's ranks, process table and memory.

    Every call names the caller's attempt (attempts.METADATA). A lower one is refused: its engine should be gone.
    """

    def __init__(
        self,
        settings: ServeSettings,
        ranks: Ranks,
        table: ProcessTable,
        memory: MemoryHolder,
        *,
        end_pod: Callable[[Ending], None],
    ) -> None:
        """end_pod: called when a caller is of a higher attempt, which this pod is then not part of."""
        self._settings = settings
        self._end_pod = end_pod
        self._ranks = ranks
        self._table = table
        self._memory = memory

    async def Watch(  # noqa: N802 - the names are the proto's
        self, request: worker_pb2.WatchRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.WatchResponse]:
        """The present state as events, then what happens."""
        await self._check_attempt(context)
        await context.send_initial_metadata(())  # the watch stands, whether or not there is an event yet
        queue: asyncio.Queue[worker_pb2.WatchResponse] = asyncio.Queue(_WATCH_QUEUE)
        lagging = asyncio.Event()

        def note(process: Process) -> None:
            event = self._event(process)
            if event is None:
                return
            try:
                queue.put_nowait(event)
            except asyncio.QueueFull:
                lagging.set()

        for process in self._table.processes:
            note(process)
        stop = self._table.listen(note)
        try:
            while not lagging.is_set():
                yield await queue.get()
        finally:
            stop()
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the watcher does not keep up: watch again")

    async def Respawn(  # noqa: N802
        self, request: worker_pb2.RespawnRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RespawnResponse:
        """Replaces the rank's process; answers once the new one said hello."""
        await self._check_attempt(context)
        try:
            process = await self._ranks.respawn(request.rank, request.epoch)
        except KeyError:
            await self._no_such_rank(request.rank, context)
        except StaleEpochError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except RespawnError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
        started = worker_pb2.RankStarted(rank=request.rank, pid=process.pid, port=process.port)
        return worker_pb2.RespawnResponse(started=started)

    async def Kill(  # noqa: N802
        self, request: worker_pb2.KillRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.KillResponse:
        """SIGKILLs the rank unless it is another process by now."""
        await self._check_attempt(context)
        try:
            return worker_pb2.KillResponse(killed=await self._ranks.kill(request.rank, request.pid))
        except KeyError:
            await self._no_such_rank(request.rank, context)

    async def GetSupervisorStatus(  # noqa: N802
        self, request: worker_pb2.GetSupervisorStatusRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GetSupervisorStatusResponse:
        """Processes and arenas of the pod."""
        await self._check_attempt(context)
        return worker_pb2.GetSupervisorStatusResponse(
            pod=self._settings.pod_uid,
            attempt=self._settings.attempt,
            processes=process_statuses(self._table.processes),
            arenas=self._memory.manifests,
        )

    async def ReleaseMemory(  # noqa: N802
        self, request: worker_pb2.ReleaseMemoryRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.ReleaseMemoryResponse:
        """Lets go of an arena; 0 bytes where none was held."""
        await self._check_attempt(context)
        try:
            return worker_pb2.ReleaseMemoryResponse(bytes=self._memory.release(request.arena))
        except ArenaError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    async def _check_attempt(self, context: grpc.aio.ServicerContext) -> None:
        # Not in an interceptor: there it would be asked before the token is.
        mine = self._settings.attempt
        theirs = attempts.read_attempt(dict(context.invocation_metadata() or ()).get(attempts.METADATA))
        if theirs is None:
            message = f"the call's metadata has no {attempts.METADATA}"
        elif theirs < mine:
            message = f"the engine is of attempt {theirs}, this pod of attempt {mine}: it is not obeyed"
        elif theirs > mine:
            message = f"the gang is at attempt {theirs}, this pod is of attempt {mine}"
            self._end_pod(Ending(ExitCode.RESTART_GANG, f"{attempts.STALE}{message}"))
        else:
            return
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)

    async def _no_such_rank(self, rank: int, context: grpc.aio.ServicerContext) -> NoReturn:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"rank {rank} does not belong to pod {self._settings.pod_uid}")
        raise AssertionError("abort always raises")

    def _event(self, process: Process) -> worker_pb2.WatchResponse | None:
        if process.name == SPARE and process.state == "running":
            spare = worker_pb2.SpareReady(pid=process.pid, device_bytes=process.device_bytes)
            return worker_pb2.WatchResponse(spare_ready=spare)
        rank = self._ranks.rank_of(process)
        if rank is None or process.state == "starting":
            return None
        if not process.exited.done():
            started = worker_pb2.RankStarted(rank=rank, pid=process.pid, port=process.port)
            return worker_pb2.WatchResponse(started=started)
        ended = process.exited.result()
        return worker_pb2.WatchResponse(
            exited=worker_pb2.RankExited(
                rank=rank,
                pid=ended.pid,
                code=ended.code,
                signal=ended.signal,
                last_stderr_lines=ended.last_stderr_lines,
            )
        )


class SupervisorServer:
    """The gRPC server of SupervisorService, on a port of its own choice."""

    def __init__(self, settings: ServeSettings, servicer: SupervisorServicer) -> None:
        expected = Expected.gang_token(settings.token)
        interceptor = TokenInterceptor(expected, open_prefixes=(f"/{_HEALTH_SERVICE}/",))
        self._server = grpc.aio.server(interceptors=[interceptor], options=_OPTIONS)
        worker_pb2_grpc.add_SupervisorServiceServicer_to_server(servicer, self._server)
        self._health = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), self._server)
        self.port = self._server.add_insecure_port(join_host_port(settings.address, 0))

    async def start(self) -> None:
        """Starts serving."""
        for service in ("", _SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()

    async def stop(self) -> None:
        """Stops serving at once."""
        await self._server.stop(0)
