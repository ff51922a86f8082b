"""The sending direction: a bounded queue, and the thread that empties it."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch

from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvHeaderError, KvPipeClosedError, KvPipeError, KvPipeTimeoutError
from tpmodel_worker.kv.header import (
    REPLY_BYTES,
    Header,
    ItemKind,
    Reply,
    ReplyKind,
    decode_reply,
    encode_header,
    tensor_header,
)
from tpmodel_worker.kv.link import SENDER, Link, as_bytes

_END_SECONDS = 2.0
"""How long the peer may take to hear that this is the end: by then everything has arrived."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Item:
    tensor: torch.Tensor | None
    """A copy of the caller's, on the pipe's device, contiguous."""
    copied: torch.cuda.Event | None
    """When the copy is whole, on CUDA."""

    @property
    def bytes(self) -> int:
        return 0 if self.tensor is None else self.tensor.numel() * self.tensor.element_size()


class Sender:
    """Sends in the order of the calls. Callers from any thread."""

    def __init__(self, link: Link, config: KvPipeConfig) -> None:
        self._link = link
        self._config = config
        self._device = config.resolve_device()
        # Held through wait, copy and enqueueing: that is what keeps the order.
        self._order = threading.Lock()
        self._changed = threading.Condition()
        self._queue: deque[_Item] = deque()
        self._queued_bytes = 0
        self._undelivered = 0
        """Items queued or on their way."""
        self._sent = 0
        self._closing = False
        self._error: KvPipeError | None = None
        self._thread = threading.Thread(target=self._run, name="kv send", daemon=True)
        self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes of the tensors that wait or are on their way."""
        return self._queued_bytes

    @property
    def error(self) -> KvPipeError | None:
        """What broke this direction."""
        return self._error

    def send(self, tensor: torch.Tensor | None, seconds: float) -> None:
        """Queues a copy. Waits while more than the limit is queued, for that many seconds at most.

        Raises:
            ValueError: it can't be said in a header, or is larger than the pipe takes.
            KvPipeError: an earlier item could not be sent, or the queue did not shrink; nothing was queued.
            KvPipeClosedError: the pipe was closed.
        """
        if tensor is not None:
            size = tensor_header(tensor, 0).payload_bytes
            if size > self._config.max_tensor_bytes:
                raise ValueError(f"a tensor of {size} bytes: at most {self._config.max_tensor_bytes} can be sent")
        deadline = time.monotonic() + seconds
        if not self._order.acquire(timeout=seconds):
            raise self._late(seconds)
        try:
            self._wait_for_room(deadline, seconds)
            item = self._copy(tensor)
            with self._changed:
                self._check()
                self._queue.append(item)
                self._queued_bytes += item.bytes
                self._undelivered += 1
                self._changed.notify_all()
        finally:
            self._order.release()

    def close(self, seconds: float) -> None:
        """Sends what is queued and says that this is the end; breaks off after that many seconds. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._undelivered == 0 or self._error is not None, seconds)
            late = self._undelivered
        if late:
            self._fail(KvPipeTimeoutError(f"{late} items were not sent within {seconds:g} s of close"))
        self._thread.join()

    def abort(self, reason: str) -> None:
        """Drops what is queued and breaks off what is on its way. From any thread; idempotent."""
        self._fail(KvPipeError(reason))

    def _wait_for_room(self, deadline: float, seconds: float) -> None:
        limit = self._config.send_limit_bytes
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._error is not None or self._queued_bytes <= limit,
                max(deadline - time.monotonic(), 0),
            )
            self._check()
            if self._queued_bytes > limit:
                raise self._late(seconds)

    def _late(self, seconds: float) -> KvPipeTimeoutError:
        return KvPipeTimeoutError(
            f"{self._queued_bytes} bytes are queued, more than {self._config.send_limit_bytes}, for {seconds:g} s"
        )

    def _check(self) -> None:
        if self._error is not None:
            raise KvPipeError(f"the pipe can't send any more: {self._error}") from self._error
        if self._closing:
            raise KvPipeClosedError("the pipe was closed")

    def _copy(self, tensor: torch.Tensor | None) -> _Item:
        if tensor is None:
            return _Item(None, None)
        if self._device.type != "cuda":
            return _Item(_copy_to(tensor, self._device), None)
        with torch.cuda.device(self._device):
            # On the caller's stream: behind what it has launched on the source, before what it launches next.
            copy = _copy_to(tensor, self._device)
            copied = torch.cuda.Event()
            copied.record()
        return _Item(copy, copied)

    # ---------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.inference_mode():
            while (item := self._next()) is not None:
                try:
                    self._transfer(item, stream)
                except KvPipeError as error:
                    self._fail(error)
                except CommunicatorError as error:
                    self._fail(KvPipeError(f"item {self._sent}: {error}"))
                except Exception as error:  # The boundary: the next caller gets it.
                    _logger.exception("the pipe can't send")
                    self._fail(KvPipeError(f"{type(error).__name__}: {error}"))
                self._done(item)
            if self._error is None:
                self._say_end()

    def _next(self) -> _Item | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or self._error is not None)
            # It keeps its bytes until it has arrived.
            return self._queue.popleft() if self._queue else None

    def _done(self, item: _Item) -> None:
        with self._changed:
            if self._error is None:  # else everything was given back
                self._queued_bytes -= item.bytes
                self._undelivered -= 1
            self._changed.notify_all()

    def _transfer(self, item: _Item, stream: torch.cuda.Stream | None) -> None:
        tensor = item.tensor
        header = Header(ItemKind.NONE, self._sent) if tensor is None else tensor_header(tensor, self._sent)
        seconds = self._config.deadline_seconds
        self._link.control.write(encode_header(header), seconds)
        if tensor is not None and header.payload_bytes:
            self._expect(ReplyKind.GO)
            if stream is None:
                self._link.data.broadcast(as_bytes(tensor), SENDER)
            else:
                self._launch(tensor, item.copied, stream)
        self._expect(ReplyKind.DONE)
        if stream is not None:
            # It has arrived, so this does not wait; after it the copy's memory may be used for something else.
            stream.synchronize()
        self._sent += 1

    def _launch(self, tensor: torch.Tensor, copied: torch.cuda.Event | None, stream: torch.cuda.Stream) -> None:
        assert copied is not None, "copies on CUDA have an event"
        with torch.cuda.stream(stream):
            stream.wait_event(copied)
            self._link.data.broadcast(as_bytes(tensor), SENDER)

    def _expect(self, kind: ReplyKind, seconds: float | None = None) -> None:
        reply = self._read_reply(seconds or self._config.deadline_seconds)
        if reply.kind is ReplyKind.REFUSED:
            raise KvPipeError(f"the peer refused item {self._sent}: {reply.text}")
        if reply.kind is not kind:
            raise KvHeaderError(f"the peer answered {reply.kind.name} in the place of {kind.name}")

    def _read_reply(self, seconds: float) -> Reply:
        return decode_reply(self._link.control.read(REPLY_BYTES, seconds), sequence=self._sent)

    def _say_end(self) -> None:
        try:
            header = Header(ItemKind.END, self._sent)
            self._link.control.write(encode_header(header), _END_SECONDS)
            self._expect(ReplyKind.DONE, _END_SECONDS)
        except KvPipeError as error:
            # Everything has arrived: the peer was closed first, or is gone.
            _logger.debug("the peer did not hear the end: %s", error)

    def _fail(self, error: KvPipeError) -> None:
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            self._queue.clear()
            self._queued_bytes = self._undelivered = 0
            self._changed.notify_all()
        _logger.error("the pipe can't send any more: %s", error)
        self._link.abort(str(error))


def _copy_to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    copy.copy_(tensor.detach())
    return copy
