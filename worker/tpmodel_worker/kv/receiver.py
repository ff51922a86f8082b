"""The receiving direction: a thread that takes what comes, up to a limit, and the queue of what has come."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque

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

_FIRST_POLL_SECONDS = 20e-6
_LAST_POLL_SECONDS = 1e-3

_logger = logging.getLogger(__name__)


class Receiver:
    """Receives in the order in which the peer sent. Callers from any thread."""

    def __init__(self, link: Link, config: KvPipeConfig) -> None:
        self._link = link
        self._config = config
        self._device = config.resolve_device()
        self._changed = threading.Condition()
        self._ready: deque[torch.Tensor | None] = deque()
        self._ready_bytes = 0
        self._received = 0
        self._closed = False
        self._ended: KvPipeError | None = None
        self._thread = threading.Thread(target=self._run, name="kv receive", daemon=True)
        self._thread.start()

    @property
    def ready_bytes(self) -> int:
        """Bytes of the tensors that have come and were not taken."""
        return self._ready_bytes

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
                self._ready_bytes -= tensor.numel() * tensor.element_size()
            self._changed.notify_all()
        if tensor is not None and tensor.is_cuda:
            # It was made on the thread's stream: its memory stays until the caller's stream is through with it.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor

    def close(self) -> None:
        """Drops what was not taken and ends the thread. Idempotent."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._ready_bytes = 0
            self._changed.notify_all()
        self._link.abort("the pipe was closed")
        self._thread.join()

    # ---------------------------------------------------------------------------------- the thread

    def _run(self) -> None:
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        with torch.no_grad():
            while True:
                try:
                    if not self._receive_one(stream):
                        return
                except KvPipeError as error:
                    self._fail(error)
                    return
                except CommunicatorError as error:
                    self._fail(KvPipeError(f"item {self._received}: {error}"))
                    return
                except Exception as error:  # The boundary: the next caller gets it.
                    if not self._closed:
                        _logger.exception("the pipe can't receive")
                    self._fail(KvPipeError(f"{type(error).__name__}: {error}"))
                    return

    def _receive_one(self, stream: torch.cuda.Stream | None) -> bool:
        """False: the peer has said that this is the end."""
        header = self._read_header()
        if header.kind is ItemKind.END:
            self._reply(ReplyKind.DONE)
            self._end(KvPipeClosedError("the peer has closed the pipe"))
            return False
        self._wait_for_room()
        tensor = None
        if header.kind is ItemKind.TENSOR:
            tensor = self._allocate(header, stream)
            if header.payload_bytes:
                self._reply(ReplyKind.GO)
                self._fill(tensor, stream)
        self._reply(ReplyKind.DONE)
        self._received += 1
        with self._changed:
            if not self._closed:
                self._ready.append(tensor)
                self._ready_bytes += header.payload_bytes
                self._changed.notify_all()
        return True

    def _read_header(self) -> Header:
        data = self._link.control.read(HEADER_BYTES, self._config.deadline_seconds, idle=True)
        try:
            return decode_header(data, sequence=self._received, max_payload_bytes=self._config.max_tensor_bytes)
        except KvHeaderError as error:
            self._reply(ReplyKind.REFUSED, str(error))
            raise

    def _allocate(self, header: Header, stream: torch.cuda.Stream | None) -> torch.Tensor:
        assert header.dtype is not None, "headers of tensors have a dtype"
        try:
            with torch.cuda.stream(stream):
                return torch.empty(header.shape, dtype=header.dtype, device=self._device)
        except RuntimeError as error:
            self._reply(ReplyKind.REFUSED, f"no memory for {header.payload_bytes} bytes")
            raise KvPipeError(f"no memory for a tensor of {header.payload_bytes} bytes: {error}") from error

    def _fill(self, tensor: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        if stream is None:
            self._link.data.broadcast(as_bytes(tensor), SENDER)
            return
        with torch.cuda.stream(stream):
            self._link.data.broadcast(as_bytes(tensor), SENDER)
            arrived = torch.cuda.Event()
            arrived.record()
        # A peer that dies leaves the kernel waiting: the group's abort ends it, and this wait must not hang before.
        deadline = time.monotonic() + self._config.deadline_seconds
        pause = _FIRST_POLL_SECONDS
        while not arrived.query():
            if self._closed or time.monotonic() >= deadline:
                raise KvPipeTimeoutError(f"{tensor.numel()} elements did not come in time")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    def _wait_for_room(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready_bytes <= self._config.receive_limit_bytes)
            if self._closed:
                raise KvPipeClosedError("the pipe was closed")

    def _reply(self, kind: ReplyKind, text: str = "") -> None:
        self._link.control.write(encode_reply(Reply(kind, self._received, text)), self._config.deadline_seconds)

    def _fail(self, error: KvPipeError) -> None:
        if not self._closed:
            _logger.error("the pipe can't receive any more: %s", error)
        self._end(error)
        self._link.abort(str(error))

    def _end(self, error: KvPipeError) -> None:
        with self._changed:
            self._ended = error
            self._changed.notify_all()
