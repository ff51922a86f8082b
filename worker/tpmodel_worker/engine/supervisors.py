"""The engine's view of the pods' supervisors: which rank processes have ended there, and how to end one."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping

import grpc

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker import attempts
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.session import RankEndpoint

logger = logging.getLogger(__name__)

SUBSCRIPTION_SECONDS = 5.0
"""For a supervisor to accept a watch."""
_RETRY_SECONDS = 0.5
_KILL_SECONDS = 2.0
_CHANNEL_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)

ExitListener = Callable[[int, int, str], None]
"""Called with a rank, the pid of its process and how that ended."""


class Supervisors:
    """Watches the processes of every registered pod, and kills on demand."""

    def __init__(self, token: str, attempt: int, *, on_exit: ExitListener, on_failure: Callable[[str], None]) -> None:
        """on_failure: told when a pod cannot be watched, once until it can be again (W27)."""
        self._metadata = (*token_metadata(token), (attempts.METADATA, str(attempt)))
        self._on_exit = on_exit
        self._on_failure = on_failure
        self._watches: dict[str, tuple[str, asyncio.Task[None]]] = {}

    def follow(self, targets: Mapping[str, str]) -> None:
        """Watches exactly these pods: SupervisorService addresses by pod UID."""
        for pod, (target, task) in list(self._watches.items()):
            if targets.get(pod) != target:
                task.cancel()
                del self._watches[pod]
        for pod, target in targets.items():
            if pod not in self._watches:
                task = asyncio.create_task(self._watch(pod, target), name=f"watch of pod {pod}")
                self._watches[pod] = (target, task)

    async def kill(self, endpoint: RankEndpoint) -> bool:
        """SIGKILLs a rank's process, unless it is another one by now; False where that could not be asked for."""
        known = self._watches.get(endpoint.pod)
        if known is None:
            return False
        request = worker_pb2.KillRequest(rank=endpoint.rank, pid=endpoint.pid)
        async with grpc.aio.insecure_channel(known[0], options=_CHANNEL_OPTIONS) as channel:
            stub: worker_pb2_grpc.SupervisorServiceAsyncStub = worker_pb2_grpc.SupervisorServiceStub(channel)
            try:
                await stub.Kill(request, timeout=_KILL_SECONDS, metadata=self._metadata)
            except grpc.aio.AioRpcError as error:
                logger.warning("rank %d could not be killed: %s", endpoint.rank, _text(error))
                return False
        return True

    async def close(self) -> None:
        """Ends every watch."""
        tasks = [task for _, task in self._watches.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, pod: str, target: str) -> None:
        failing = False
        while True:
            async with grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
                stub: worker_pb2_grpc.SupervisorServiceAsyncStub = worker_pb2_grpc.SupervisorServiceStub(channel)
                call = stub.Watch(worker_pb2.WatchRequest(), metadata=self._metadata)
                try:
                    async with asyncio.timeout(SUBSCRIPTION_SECONDS):
                        await call.wait_for_connection()
                    failing = False
                    async for event in call:
                        self._take(event)
                    reason = "the stream ended"
                except TimeoutError:
                    reason = f"no answer within {SUBSCRIPTION_SECONDS:g} s"
                except grpc.aio.AioRpcError as error:
                    reason = _text(error)
            if not failing:
                failing = True
                self._on_failure(f"the processes of pod {pod} are not watched: {reason}")
            await asyncio.sleep(_RETRY_SECONDS)

    def _take(self, event: worker_pb2.WatchResponse) -> None:
        if event.HasField("exited"):
            self._on_exit(event.exited.rank, event.exited.pid, _describe(event.exited))


def _describe(ended: worker_pb2.RankExited) -> str:
    """For example: its process (pid 4711) was killed by SIGKILL."""
    if not ended.HasField("signal"):
        return f"its process (pid {ended.pid}) ended with code {ended.code}"
    known = ended.signal in signal.Signals.__members__.values()
    name = signal.Signals(ended.signal).name if known else f"signal {ended.signal}"
    return f"its process (pid {ended.pid}) was killed by {name}"


def _text(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
