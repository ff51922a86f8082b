"""Where the api processes come in: requests and cancels in, one batch of outputs per step out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from google.protobuf.message import DecodeError

from tpmodel.v1 import inference_pb2, pod_pb2, worker_pb2
from tpmodel_worker.engine.requests import KeepKv, KvSource, RefusedError, Request, SequenceOutput
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.framing import FrameTooLargeError, frame, read_message

logger = logging.getLogger(__name__)

MAX_OUTGOING_BYTES = 64 * 1024 * 1024
"""What may wait for an api process before it counts as gone."""

Key = tuple[int, int]
"""A request's name in the engine: its connection's number and its handle."""


class WrongWeightsError(RefusedError):
    """The stream was begun with other weights than the ones here."""

    code: ClassVar[int] = 9  # FAILED_PRECONDITION


class RequestHandler(Protocol):
    """What requests are handed to."""

    def submit(self, request: Request) -> None:
        """Takes a request. Raises RefusedError."""
        ...

    def cancel(self, key: Key, sample_index: int | None = None) -> bool:
        """Ends a request or one sample of it; False where it was not live."""
        ...


class Front:
    """The Unix socket server for api processes.

    Nothing here waits for an api process: what it does not read is kept for it up to a limit; beyond it,
    or when it goes away, its connection is dropped and its requests are cancelled.
    """

    def __init__(
        self,
        path: Path,
        handler: RequestHandler,
        status: EngineStatus,
        *,
        max_outgoing_bytes: int = MAX_OUTGOING_BYTES,
    ) -> None:
        self._path = path
        self._handler = handler
        self._status = status
        self._max_outgoing_bytes = max_outgoing_bytes
        self._connections: dict[int, _Connection] = {}
        self._opened = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listens; a socket file left by an engine before this one is replaced."""
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, path=str(self._path))

    async def stop(self) -> None:
        """Drops every connection and stops listening."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections.values()):
            connection.abort()
        self._path.unlink(missing_ok=True)

    def deliver(self, outputs: Sequence[SequenceOutput]) -> None:
        """Sends each api process what is for it, as one message."""
        batches: dict[int, list[SequenceOutput]] = {}
        for output in outputs:
            number, _ = _key(output)
            batches.setdefault(number, []).append(output)
        for number, batch in batches.items():
            # Outputs of a connection that is gone are for nobody: its requests are being cancelled.
            if connection := self._connections.get(number):
                connection.send_outputs(batch)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._opened += 1
        connection = _Connection(self._opened, writer, self._max_outgoing_bytes)
        self._connections[connection.number] = connection
        stop_listening = self._status.listen(connection.send_state)
        try:
            while (message := await read_message(reader, pod_pb2.FrontRequest)) is not None:
                self._handle(connection, message)
        except (OSError, asyncio.IncompleteReadError, FrameTooLargeError, DecodeError) as error:
            logger.warning("connection %d of an api process broke: %s", connection.number, error)
        finally:
            stop_listening()
            del self._connections[connection.number]
            for handle in connection.live:
                self._handler.cancel((connection.number, handle))
            connection.abort()

    def _handle(self, connection: _Connection, message: pod_pb2.FrontRequest) -> None:
        if message.HasField("submit"):
            self._submit(connection, message.submit)
        elif message.HasField("cancel"):
            self._cancel(connection, message.cancel)

    def _submit(self, connection: _Connection, message: pod_pb2.SubmitRequest) -> None:
        handle = message.handle
        try:
            if message.HasField("weight_version"):
                self._check_weights(message.weight_version)
            # Before submitting: outputs may follow at once.
            connection.live[handle] = max(message.n, 1)
            self._handler.submit(_request((connection.number, handle), message))
        except RefusedError as error:
            connection.live.pop(handle, None)
            logger.info("refused: %s", error, extra={"request_id": message.request_id})
            refusal = pod_pb2.RequestError(code=error.code, message=str(error))
            connection.send(pod_pb2.OutputBatch(outputs=[pod_pb2.Output(handle=handle, error=refusal)]))

    def _cancel(self, connection: _Connection, message: pod_pb2.CancelRequest) -> None:
        handle = message.handle
        if handle not in connection.live:
            return
        if message.HasField("sample_index"):
            if self._handler.cancel((connection.number, handle), message.sample_index):
                connection.sample_ended(handle)
        else:
            self._handler.cancel((connection.number, handle))
            del connection.live[handle]

    def _check_weights(self, wanted: int) -> None:
        present = self._status.state.weight_version
        if wanted != present:
            raise WrongWeightsError(f"the stream needs weight version {wanted}, this gang serves {present}")


class _Connection:
    """One api process: its live requests and the messages on their way to it."""

    def __init__(self, number: int, writer: asyncio.StreamWriter, max_outgoing_bytes: int) -> None:
        self.number = number
        # Samples that have not ended, by handle.
        self.live: dict[int, int] = {}
        self._writer = writer
        self._max_outgoing_bytes = max_outgoing_bytes

    def send_state(self, state: worker_pb2.EngineState) -> None:
        self._write(pod_pb2.FrontResponse(state=state))

    def send_outputs(self, outputs: Sequence[SequenceOutput]) -> None:
        batch = pod_pb2.OutputBatch()
        for output in outputs:
            _, handle = _key(output)
            if handle not in self.live:
                continue  # cancelled by this api process after the output was made
            _fill(batch.outputs.add(), handle, output)
            if output.error is not None:
                self.live.pop(handle, None)
            elif output.finish_reason is not None:
                self.sample_ended(handle)
        if batch.outputs:
            self.send(batch)

    def sample_ended(self, handle: int) -> None:
        self.live[handle] -= 1
        if self.live[handle] == 0:
            del self.live[handle]

    def send(self, batch: pod_pb2.OutputBatch) -> None:
        self._write(pod_pb2.FrontResponse(outputs=batch))

    def abort(self) -> None:
        self._writer.transport.abort()

    def _write(self, message: pod_pb2.FrontResponse) -> None:
        transport = self._writer.transport
        if transport.is_closing():
            return
        transport.write(frame(message))
        if transport.get_write_buffer_size() > self._max_outgoing_bytes:
            logger.warning("an api process does not read its outputs: dropping connection %d", self.number)
            transport.abort()


def _key(output: SequenceOutput) -> Key:
    key = output.key
    assert isinstance(key, tuple)
    return key


def _request(key: Key, message: pod_pb2.SubmitRequest) -> Request:
    return Request(
        key=key,
        request_id=message.request_id,
        prompt_token_ids=list(message.prompt_token_ids),
        resume_token_ids=list(message.resume_token_ids),
        sampling=message.sampling,
        n=message.n,
        priority=message.priority,
        deadline=message.deadline or None,
        keep_kv=KeepKv(message.kept_ticket, message.keep_kv.seconds) if message.HasField("keep_kv") else None,
        kv_source=_source(message.kv_source) if message.HasField("kv_source") else None,
    )


def _source(message: inference_pb2.KvSource) -> KvSource:
    return KvSource(message.target, message.ticket)


def _fill(target: pod_pb2.Output, handle: int, output: SequenceOutput) -> None:
    target.handle = handle
    target.sample_index = output.sample_index
    target.token_ids.extend(output.token_ids)
    if output.logprobs:
        target.logprobs.extend(output.logprobs)
    if output.finish_reason is not None:
        target.finish_reason = output.finish_reason
    if output.admitted is not None:
        target.admitted.cached_tokens = output.admitted.cached_tokens
        target.admitted.weight_version = output.admitted.weight_version
    if output.error is not None:
        target.error.code, target.error.message = output.error
        target.error.retry_after_ms = round(1000 * output.retry_after)
