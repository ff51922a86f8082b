"""WorkerService of one rank, in a thread with its own event loop, so that it answers while the rank computes.

Imported only in the rank process itself: gRPC does not survive a fork.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import worker_pb2 as pb
from tpmodel.v1 import worker_pb2_grpc
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaLinkError
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.rank.session import EpochGate, OpenVerdict, SessionProtocol
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.rank.worker import Worker

EPOCH_METADATA = "tpmodel-epoch"
INSTANCE_METADATA = "tpmodel-instance"
_SERVICE = "tpmodel.v1.WorkerService"
_STOP_SECONDS = 2.0
_START_SECONDS = 30.0
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # The engine's keepalive asks every few seconds, also while no call is open.
    ("grpc.keepalive_permit_without_calls", 1),
    # A session whose engine has vanished without a word ends, too.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.so_reuseport", 0),
)

_logger = logging.getLogger(__name__)


class RankServer:
    """Serves WorkerService and health from start() to stop()."""

    def __init__(
        self,
        *,
        address: str,
        token: str,
        worker: Worker,
        gate: EpochGate,
        status: StatusBoard,
        arenas: ArenaClient,
    ) -> None:
        self._address = address
        self._token = token
        self._servicer = _WorkerServicer(worker=worker, gate=gate, status=status, arenas=arenas)
        self._port: concurrent.futures.Future[int] = concurrent.futures.Future()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="grpc", daemon=True)

    def start(self) -> int:
        """Listens on a port that the kernel chose; returns it.

        Raises:
            OSError, RuntimeError: it can't be listened on the address.
        """
        self._thread.start()
        return self._port.result(timeout=_START_SECONDS)

    def stop(self) -> None:
        """Lets what was answered go out, then ends the thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(2 * _STOP_SECONDS)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        interceptor = TokenInterceptor(Expected.gang_token(self._token), open_prefixes=("/grpc.health.v1.",))
        server = grpc.aio.server(interceptors=(interceptor,), options=_OPTIONS)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(self._servicer, server)
        health_servicer = HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
        try:
            port = server.add_insecure_port(join_host_port(self._address, 0))
            await server.start()
        except (OSError, RuntimeError) as error:
            self._port.set_exception(error)
            return
        await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        self._port.set_result(port)
        await self._stopping.wait()
        await server.stop(_STOP_SECONDS)


class _Session:
    """One open session: what was asked of it and what goes out on it. Used in the I/O thread, but for send."""

    def __init__(self, epoch: int, loop: asyncio.AbstractEventLoop) -> None:
        self.protocol = SessionProtocol(epoch)
        self.outgoing: asyncio.Queue[pb.SessionResponse | None] = asyncio.Queue()
        self._loop = loop
        self.said_bye = False
        self._half_closed = False

    def send(self, response: pb.SessionResponse) -> None:
        """From any thread: a reply of the computing side."""
        with contextlib.suppress(RuntimeError):  # The loop is closed: so is every session.
            self._loop.call_soon_threadsafe(self.send_here, response)

    def send_here(self, response: pb.SessionResponse) -> None:
        """In the I/O thread: as send."""
        if self.protocol.reply(response):
            self.outgoing.put_nowait(response)
        else:
            _logger.debug("a reply to nothing is dropped", extra={"epoch": response.epoch, "seq": response.seq})
        self.said_bye = self.said_bye or response.HasField("bye")
        if self.said_bye or (self._half_closed and self.protocol.idle):
            self.end()

    def half_close(self) -> None:
        """No more requests come: the session ends with its last reply."""
        self._half_closed = True
        if self.protocol.idle:
            self.end()

    def end(self) -> None:
        """Ends the stream after what was sent."""
        self.outgoing.put_nowait(None)


class _WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    def __init__(self, *, worker: Worker, gate: EpochGate, status: StatusBoard, arenas: ArenaClient) -> None:
        self._worker = worker
        self._gate = gate
        self._status = status
        self._arenas = arenas
        self._session: _Session | None = None
        """The newest one."""
        self._background: set[asyncio.Task[None]] = set()

    # A coroutine that writes, since a cancelled generator would not be closed at once.
    async def Session(  # noqa: N802 # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        request_iterator: AsyncIterator[pb.SessionRequest],
        context: grpc.aio.ServicerContext[pb.SessionRequest, pb.SessionResponse],
    ) -> None:
        """Opens the metadata's epoch; ends with the stream, which ends the epoch."""
        epoch = await _epoch_of(context)
        await self._open(epoch, context)
        session = _Session(epoch, asyncio.get_running_loop())
        if self._session is not None:
            self._session.end()
        self._session = session
        self._worker.open(epoch, session.send)
        reader = asyncio.create_task(self._read(request_iterator, session))
        try:
            # Tells the engine that the session is open before it sends anything.
            await context.send_initial_metadata(())
            while (response := await session.outgoing.get()) is not None:
                await context.write(response)
        finally:
            reader.cancel()
            if not session.said_bye:
                # Nobody can send anything in this epoch any more: who waits in a collective waits in vain.
                self._in_background(self._end(epoch, "the session has ended"))

    async def _open(self, epoch: int, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        # Before the first session there is nothing to end.
        if self._gate.current and self._gate.newest < epoch:
            await self._end(epoch - 1, f"epoch {epoch} begins")
        match self._gate.open(epoch):
            case OpenVerdict.DUPLICATE:
                message = f"epoch {epoch} has a session already"
                await context.abort(grpc.StatusCode.ALREADY_EXISTS, message)
            case OpenVerdict.STALE:
                message = f"epoch {epoch} is over: only epochs newer than {self._gate.newest} are accepted"
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
            case OpenVerdict.ACCEPTED:
                return

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], session: _Session) -> None:
        async for request in requests:
            refusal = session.protocol.receive(request)
            if refusal is not None:
                session.outgoing.put_nowait(refusal)
            elif self._gate.ended >= request.epoch:
                # The computing thread may have left the epoch, and would not answer.
                error = pb.Error(kind=pb.ERROR_KIND_ABORTED, message=f"epoch {request.epoch} has ended")
                session.send_here(pb.SessionResponse(epoch=request.epoch, seq=request.seq, error=error))
            else:
                self._worker.submit(request)
        session.half_close()

    async def Ping(  # noqa: N802
        self, request: pb.PingRequest, context: grpc.aio.ServicerContext[pb.PingRequest, pb.PingResponse]
    ) -> pb.PingResponse:
        """A sign of life."""
        return self._status.ping(self._gate.current)

    async def GetStatus(  # noqa: N802
        self, request: pb.GetStatusRequest, context: grpc.aio.ServicerContext[pb.GetStatusRequest, pb.GetStatusResponse]
    ) -> pb.GetStatusResponse:
        """The rank's account of itself; its epoch is the highest seen."""
        status = self._status.status()
        status.epoch = self._gate.newest
        return status

    async def Abort(  # noqa: N802
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext[pb.AbortRequest, pb.AbortResponse]
    ) -> pb.AbortResponse:
        """Ends the epoch and all older ones; returns once the computing thread is out of them."""
        _logger.warning("aborted: %s", request.reason, extra={"epoch": request.epoch})
        await self._end(request.epoch, request.reason or "the engine aborted it")
        return pb.AbortResponse(epoch=request.epoch)

    async def AwaitKvTransfer(  # noqa: N802
        self,
        request: pb.AwaitKvTransferRequest,
        context: grpc.aio.ServicerContext[pb.AwaitKvTransferRequest, pb.AwaitKvTransferResponse],
    ) -> pb.AwaitKvTransferResponse:
        """Returns once this rank's part of a handover is over."""
        handover = self._worker.handovers.find(request.transfer)
        if handover is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no KV transfer {request.transfer!r}")
        outcome = await asyncio.wrap_future(handover.outcome)
        self._worker.handovers.forget(request.transfer)
        return pb.AwaitKvTransferResponse(error=outcome.error, bytes=outcome.bytes, seconds=outcome.seconds)

    async def CancelKvTransfer(  # noqa: N802
        self,
        request: pb.CancelKvTransferRequest,
        context: grpc.aio.ServicerContext[pb.CancelKvTransferRequest, pb.CancelKvTransferResponse],
    ) -> pb.CancelKvTransferResponse:
        """Breaks a handover off; returns once its thread has ended."""
        handover = self._worker.handovers.find(request.transfer)
        if handover is not None:
            await asyncio.to_thread(handover.cancel, request.reason)
            await asyncio.wrap_future(handover.outcome)
            self._worker.handovers.forget(request.transfer)
        return pb.CancelKvTransferResponse()

    async def _end(self, epoch: int, reason: str) -> None:
        """Ends the epoch and all older ones, and waits until the computing thread has left them.

        The supervisor is told at the same time: if the computing thread does not leave, it kills the process.
        """
        loop = asyncio.get_running_loop()
        left = loop.create_future()

        def leave() -> None:
            with contextlib.suppress(RuntimeError):  # The loop is closed: nobody waits.
                loop.call_soon_threadsafe(lambda: left.done() or left.set_result(None))

        await asyncio.gather(
            asyncio.to_thread(self._gate.end, epoch, reason),
            asyncio.to_thread(self._tell_supervisor, epoch, False),
        )
        self._worker.leave(epoch, leave)
        await left
        await asyncio.to_thread(self._tell_supervisor, epoch, True)

    def _tell_supervisor(self, epoch: int, done: bool) -> None:
        try:
            if done:
                self._arenas.abort_done(epoch)
            else:
                self._arenas.abort_started(epoch, self._worker.abort_seconds)
        except ArenaLinkError as error:
            # The end of the link ends the process; until then there is nobody to tell.
            _logger.warning("the supervisor could not be told of the abort: %s", error, extra={"epoch": epoch})

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


async def _epoch_of(context: grpc.aio.ServicerContext[Any, Any]) -> int:
    metadata = dict(context.invocation_metadata() or ())
    text = str(metadata.get(EPOCH_METADATA, ""))
    if not text.isascii() or not text.isdigit() or not 0 < int(text) < 1 << 64:
        message = f"metadata {EPOCH_METADATA!r} is {text!r}: expected a number from 1 to 2^64 - 1"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
    return int(text)
