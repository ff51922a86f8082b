"""This process's connection to the engine: requests out, outputs and the engine's state in."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable
from pathlib import Path

import grpc
from google.protobuf.message import DecodeError

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker import framing
from tpmodel_worker.api.errors import ApiError, unavailable

logger = logging.getLogger(__name__)

_RECONNECT_SECONDS = 0.2
# What may wait for one slow client. It goes out as one chunk, which with text is up to three times as large and
# must stay below the 4 MiB that gRPC clients accept by default.
MAX_PENDING_BYTES = 1024 * 1024
_ACCEPTING = (worker_pb2.PHASE_SERVING, worker_pb2.PHASE_REBUILDING)
_DRAINING = (worker_pb2.PHASE_DRAINING, worker_pb2.PHASE_DRAINED)


class OutputQueue:
    """Outputs of one request that its stream has not taken yet, joined by sample."""

    def __init__(self, *, limit_bytes: int, observe: Callable[[pod_pb2.Output], None] | None = None) -> None:
        """Starts empty.

        Args:
            limit_bytes: more than this waiting ends the request with RESOURCE_EXHAUSTED.
            observe: called with each output as it arrives, however slow the client is.
        """
        self._limit = limit_bytes
        self._observe = observe
        self._pending: dict[int, pod_pb2.Output] = {}
        self._pending_bytes = 0
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, output: pod_pb2.Output) -> bool:
        """Adds an output without waiting; False when nothing more is wanted."""
        if self._error is not None:
            return False
        if output.HasField("error"):
            self.fail(ApiError.from_engine(output.error))
            return False
        self._pending_bytes += output.ByteSize()
        if self._pending_bytes > self._limit:
            self._pending.clear()
            message = f"the client reads too slowly: more than {self._limit} bytes wait for it"
            self.fail(ApiError(grpc.StatusCode.RESOURCE_EXHAUSTED, message))
            return False
        if self._observe is not None:
            self._observe(output)
        # Copies: a reference would keep the whole batch, other requests' outputs included, in memory.
        self._pending.setdefault(output.sample_index, pod_pb2.Output()).MergeFrom(output)
        self._wake()
        return True

    def fail(self, error: ApiError) -> None:
        """Ends the queue: take() raises the error once it has given out what is there."""
        if self._error is None:
            self._error = error
            self._wake()

    async def take(self) -> list[pod_pb2.Output]:
        """Waits for outputs: at most one for each sample, with all that arrived since the last call.

        Raises:
            ApiError: what the request failed with.
        """
        while not self._pending:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs = list(self._pending.values())
        self._pending.clear()
        self._pending_bytes = 0
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineLink:
    """Connects to the engine's front socket, and again whenever the connection breaks."""

    def __init__(self, path: Path, *, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        """path: ServeSettings.front_socket; max_pending_bytes: bound of each request's queue."""
        self._path = path
        self._max_pending_bytes = max_pending_bytes
        self._handles = itertools.count(1)
        self._queues: dict[int, OutputQueue] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._changed = asyncio.Event()
        self.state: worker_pb2.EngineState | None = None
        """The engine's own account; None while there is no connection."""
        self.closing = False
        """Whether this process stops; see close_to_new_requests()."""

    @property
    def serving(self) -> bool:
        """Whether requests should come here, as health checks report it."""
        state = self.state
        if self.closing or state is None or state.leaving:
            return False
        return state.phase == worker_pb2.PHASE_SERVING and not state.weights_condition

    def check_accepting(self) -> worker_pb2.EngineState:
        """The engine's state, if it takes requests; otherwise raises UNAVAILABLE (W22)."""
        if self.closing:
            raise unavailable("draining: this process takes no new requests")
        state = self.state
        if state is None:
            raise unavailable("world not built yet: there is no connection to the engine")
        if state.phase in _ACCEPTING:
            return state
        if state.phase in _DRAINING:
            raise unavailable("draining: this gang takes no new requests")
        phase = worker_pb2.Phase.Name(state.phase).removeprefix("PHASE_").lower()
        detail = f": {state.cause}" if state.cause else f" ({state.load_percent:.0f}% loaded)"
        raise unavailable(f"world not built yet: the gang is {phase}{detail}")

    def close_to_new_requests(self) -> None:
        """From now on only requests in flight go on; health checks say so."""
        self.closing = True
        self._set_state(self.state)

    async def wait_for_change(self) -> None:
        """Returns at the next change of state."""
        await self._changed.wait()

    async def submit(
        self, request: pod_pb2.SubmitRequest, observe: Callable[[pod_pb2.Output], None] | None = None
    ) -> OutputQueue:
        """Sends a request and fills in its handle. The caller must call release() when it is done with it.

        Raises:
            ApiError: UNAVAILABLE when there is no connection.
        """
        writer = self._writer
        if writer is None:
            raise unavailable("world not built yet: there is no connection to the engine")
        request.handle = next(self._handles)
        queue = OutputQueue(limit_bytes=self._max_pending_bytes, observe=observe)
        self._queues[request.handle] = queue
        writer.write(framing.frame(pod_pb2.FrontRequest(submit=request)))
        try:
            await writer.drain()
        except ConnectionError as error:
            raise unavailable("the connection to the engine broke") from error
        return queue

    def cancel_sample(self, handle: int, sample_index: int) -> None:
        """Tells the engine that one sample of several is done."""
        self._cancel(pod_pb2.CancelRequest(handle=handle, sample_index=sample_index))

    def release(self, handle: int, *, cancel: bool) -> bool:
        """Forgets a request; False where it was forgotten before.

        Args:
            handle: the request's.
            cancel: tell the engine, which otherwise has ended it by itself.
        """
        if self._queues.pop(handle, None) is None:
            return False
        if cancel:
            self._cancel(pod_pb2.CancelRequest(handle=handle))
        return True

    async def run(self) -> None:
        """Keeps the connection up until cancelled."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(str(self._path))
            except OSError:
                await asyncio.sleep(_RECONNECT_SECONDS)
                continue
            self._writer = writer
            try:
                await self._read(reader)
                logger.warning("the engine closed the connection")
            except (OSError, asyncio.IncompleteReadError, DecodeError, framing.FrameTooLargeError) as error:
                logger.warning("the connection to the engine broke: %s", error)
            finally:
                self._lost()
                writer.close()
            await asyncio.sleep(_RECONNECT_SECONDS)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while (response := await framing.read_message(reader, pod_pb2.FrontResponse)) is not None:
            if response.HasField("outputs"):
                self._dispatch(response.outputs)
            elif response.HasField("state"):
                self._set_state(response.state)

    def _dispatch(self, batch: pod_pb2.OutputBatch) -> None:
        queues = self._queues
        for output in batch.outputs:
            queue = queues.get(output.handle)
            if queue is not None and not queue.put(output):
                self.release(output.handle, cancel=not output.HasField("error"))

    def _set_state(self, state: worker_pb2.EngineState | None) -> None:
        self.state = state
        self._changed.set()
        self._changed = asyncio.Event()

    def _lost(self) -> None:
        self._writer = None
        self._set_state(None)
        queues, self._queues = self._queues, {}
        for queue in queues.values():
            queue.fail(unavailable("the connection to the engine broke"))

    def _cancel(self, request: pod_pb2.CancelRequest) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(framing.frame(pod_pb2.FrontRequest(cancel=request)))
