"""The receiving direction: a thread that asks for what is announced, as long as there is room, and one that takes it.

Several items may be asked for and not be there yet. So their bytes follow each other without a pause.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvHeaderError, KvPipeClosedError, KvPipeError, KvPipeTimeoutError
from tpmodel_worker.kv.header import (
    HEADER_BYTES,
    Header,
    ItemKind,
    Reply,
    ReplyKind,
    decode_header,
    encode_reply,
)
from tpmodel_worker.kv.link import SENDER, Link, as_bytes
from tpmodel_worker.kv.staging import Staging, now_on

_FIRST_POLL_SECONDS = 20e-6
_LAST_POLL_SECONDS = 200e-6

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """An item that the peer may send."""

    header: Header
    tensor: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class _Coming:
    """An item that is there, or on CUDA once its event is."""

    item: _Asked
    there: torch.cuda.Event | None


class Receiver:
    """Receives in the order in which the peer sent. Callers from any thread."""

    def __init__(self, link: Link, config: KvPipeConfig) -> None:
        self._link = link
        self._config = config
        self._device = config.resolve_device()
        self._staging = Staging(self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._changed = threading.Condition()
        self._asked: deque[_Asked] = deque()
        self._ready: deque[torch.Tensor | None] = deque()
        self._ready_bytes = 0
        self._coming_bytes = 0
        """Asked for, and not ready yet."""
        self._announced = 0
        self._closed = False
        self._ended: KvPipeError | None = None
        asking, taking = (self._ask_all,), (self._take_all,)
        self._asking = threading.Thread(target=self._guard, args=asking, name="kv ask", daemon=True)
        self._taking = threading.Thread(target=self._guard, args=taking, name="kv receive", daemon=True)
        self._asking.start()
        self._taking.start()

    @property
    def ready_bytes(self) -> int:
        """Bytes of the tensors that have come and were not taken."""
        return self._ready_bytes

    @property
    def ended(self) -> KvPipeError | None:
        """Why nothing more comes."""
        return self._ended

    def receive(self, seconds: float) -> torch.Tensor | None:
        """The next item, on the pipe's device; on CUDA whatever the current stream does next sees it whole.

        What had come before the direction broke or the peer closed is still given out.

        Raises:
            KvPipeTimeoutError: none came; the next call may try again.
            KvPipeError: the direction is broken: the same for every later call.
            KvPipeClosedError: this end or the peer's was closed.
        """
        with self._changed:
            there = self._changed.wait_for(lambda: self._ready or self._closed or self._ended is not None, seconds)
            if self._closed:
                raise KvPipeClosedError("the pipe was closed")
            if not self._ready:
                if self._ended is not None:
                    raise type(self._ended)(str(self._ended)) from self._ended
                assert not there
                raise KvPipeTimeoutError(f"nothing came within {seconds:g} s")
            tensor = self._ready.popleft()
            if tensor is not None:
                self._ready_bytes -= tensor.nbytes
            self._changed.notify_all()
        if tensor is not None and tensor.is_cuda:
            # It was made on the pipe's stream: its memory stays until the caller's stream is through with it.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    @contextlib.contextmanager
    def receiving(self, seconds: float) -> Iterator[torch.Tensor | None]:
        """As receive, but what the block gets is the pipe's own: later items come into the same memory."""
        tensor = self.receive(seconds)
        try:
            yield tensor
        finally:
            if tensor is not None:
                self._staging.give_back(tensor, now_on(self._device))

    def release_memory(self) -> None:
        """Gives back what receiving has used and nothing needs now."""
        self._staging.clear()

    def abort(self, reason: str) -> None:
        """Breaks off what is on its way. From any thread; idempotent."""
        self._end(KvPipeError(reason))
        self._link.abort(reason)

    def close(self) -> None:
        """Drops what was not taken and ends the threads. Idempotent."""
        with self._changed:
            self._closed = True
            self._asked.clear()
            self._ready.clear()
            self._ready_bytes = self._coming_bytes = 0
            self._changed.notify_all()
        self._link.abort("the pipe was closed")
        self._asking.join()
        self._taking.join()
        self._staging.clear()

    # ---------------------------------------------------------------------------------- the threads

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            with torch.no_grad():
                run()
        except KvPipeError as error:
            self._fail(error)
        except CommunicatorError as error:
            self._fail(KvPipeError(f"the tensors' group: {error}"))
        except Exception as error:  # The boundary: the next caller gets it.
            if not self._closed:
                _logger.exception("the pipe can't receive")
            self._fail(KvPipeError(f"{type(error).__name__}: {error}"))

    def _ask_all(self) -> None:
        """Checks what is announced and asks for it, until the peer has said that this is the end."""
        while True:
            header = self._read_header()
            self._wait_for_room(header.payload_bytes)
            tensor = self._allocate(header) if header.kind is ItemKind.TENSOR else None
            if header.payload_bytes:
                self._reply(ReplyKind.GO, header.sequence)
            with self._changed:
                self._asked.append(_Asked(header, tensor))
                self._changed.notify_all()
            if header.kind is ItemKind.END:
                return
            self._announced += 1

    def _read_header(self) -> Header:
        data = self._link.control.read(HEADER_BYTES, self._config.deadline_seconds, idle=True)
        try:
            return decode_header(data, sequence=self._announced, max_payload_bytes=self._config.max_tensor_bytes)
        except KvHeaderError as error:
            self._reply(ReplyKind.REFUSED, self._announced, str(error))
            raise

    def _wait_for_room(self, size: int) -> None:
        """Until no more than the limit is on its way or was not taken; the item is counted then."""
        limit = self._config.receive_limit_bytes
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._ready_bytes + self._coming_bytes <= limit)
            self._check()
            self._coming_bytes += size

    def _allocate(self, header: Header) -> torch.Tensor:
        assert header.dtype is not None, "headers of tensors have a dtype"
        try:
            with torch.cuda.stream(self._stream):
                return self._staging.take(header.shape, header.dtype)
        except RuntimeError as error:
            self._reply(ReplyKind.REFUSED, header.sequence, f"no memory for {header.payload_bytes} bytes")
            raise KvPipeError(f"no memory for a tensor of {header.payload_bytes} bytes: {error}") from error

    def _take_all(self) -> None:
        """Takes what was asked for, in order."""
        coming: deque[_Coming] = deque()
        since, pause = time.monotonic(), _FIRST_POLL_SECONDS
        while True:
            item = self._next_asked(pause if coming else None)
            if item is not None:
                since = since if coming else time.monotonic()
                coming.append(self._begin(item))
            elif coming and time.monotonic() > since + self._config.deadline_seconds:
                # A peer that dies leaves the kernel waiting: the group's abort ends it.
                size = coming[0].item.header.payload_bytes
                raise KvPipeTimeoutError(f"{size} bytes did not come within {self._config.deadline_seconds:g} s")
            pause = min(2 * pause, _LAST_POLL_SECONDS)
            while coming and (coming[0].there is None or coming[0].there.query()):
                if not self._deliver(coming.popleft().item):
                    return
                since, pause = time.monotonic(), _FIRST_POLL_SECONDS

    def _next_asked(self, seconds: float | None) -> _Asked | None:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self._asked, seconds)
            self._check()
            return self._asked.popleft() if self._asked else None

    def _begin(self, item: _Asked) -> _Coming:
        """On the CPU it is there afterwards; on CUDA that is launched, behind everything that is on its way."""
        if item.tensor is None or not item.header.payload_bytes:
            return _Coming(item, None)
        with torch.cuda.stream(self._stream):
            self._link.data.broadcast(as_bytes(item.tensor), SENDER)
            return _Coming(item, now_on(self._device))

    def _deliver(self, item: _Asked) -> bool:
        """False: the peer has said that this is the end."""
        with self._changed:
            # What an abort has cut off looks as if it were there.
            self._check()
        self._reply(ReplyKind.DONE, item.header.sequence)
        if item.header.kind is ItemKind.END:
            self._end(KvPipeClosedError("the peer has closed the pipe"))
            return False
        with self._changed:
            if not self._closed:
                self._ready.append(item.tensor)
                self._ready_bytes += item.header.payload_bytes
                self._coming_bytes -= item.header.payload_bytes
                self._changed.notify_all()
        return True

    @property
    def _over(self) -> bool:
        return self._closed or self._ended is not None

    def _check(self) -> None:
        if self._over:
            raise KvPipeClosedError("the pipe was closed")

    def _reply(self, kind: ReplyKind, sequence: int, text: str = "") -> None:
        self._link.control.write(encode_reply(Reply(kind, sequence, text)), self._config.deadline_seconds)

    def _fail(self, error: KvPipeError) -> None:
        if not self._over:
            # Where nothing was to come the peer may just have closed it.
            closed = isinstance(error, KvPipeClosedError) and not self._coming_bytes
            _logger.log(logging.DEBUG if closed else logging.ERROR, "the pipe can't receive any more: %s", error)
        # Before the abort, after which what was on its way looks as if it were there.
        self._end(error)
        self._link.abort(str(error))

    def _end(self, error: KvPipeError) -> None:
        with self._changed:
            self._ended = self._ended or error
            self._changed.notify_all()
