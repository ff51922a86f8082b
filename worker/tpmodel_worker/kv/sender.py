"""The sending direction: a bounded queue, a thread that announces what is in it, and one that sends what was asked for.

Items are announced as they come, whatever has become of those before them. So the receiver can ask for several, and
their bytes follow each other without a pause.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator

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
from tpmodel_worker.kv.outgoing import Item, Outgoing
from tpmodel_worker.kv.staging import Staging, now_on

_END_SECONDS = 2.0
"""How long the peer may take to hear that this is the end: by then everything has arrived."""

_logger = logging.getLogger(__name__)


class Sender:
    """Sends in the order of the calls. Callers from any thread."""

    def __init__(self, link: Link, config: KvPipeConfig) -> None:
        self._link = link
        self._config = config
        self._device = config.resolve_device()
        self._staging = Staging(self._device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        # Held through wait, copy and enqueueing: that is what keeps the order.
        self._order = threading.Lock()
        self._changed = threading.Condition()
        self._outgoing = Outgoing()
        self._closing = False
        self._end_announced = False
        self._error: KvPipeError | None = None
        self._loss: KvPipeError | None = None
        announce, answer = (self._announce_all,), (self._answer_all,)
        self._announcing = threading.Thread(target=self._guard, args=announce, name="kv announce", daemon=True)
        self._answering = threading.Thread(target=self._guard, args=answer, name="kv send", daemon=True)
        self._announcing.start()
        self._answering.start()

    @property
    def queued_bytes(self) -> int:
        """Bytes of the tensors that wait or are on their way."""
        return self._outgoing.bytes

    @property
    def error(self) -> KvPipeError | None:
        """What broke this direction."""
        return self._error

    @property
    def loss(self) -> KvPipeError | None:
        """What broke this direction while something was queued or on its way."""
        return self._loss

    def send(self, tensor: torch.Tensor | None, seconds: float) -> None:
        """Queues a copy. Waits while more than the limit is queued, for that many seconds at most.

        Raises:
            ValueError: it can't be said in a header, or is larger than the pipe takes.
            KvPipeError: an earlier item could not be sent, or the queue did not shrink; nothing was queued.
            KvPipeClosedError: the pipe was closed.
        """
        header = Header(ItemKind.NONE, 0) if tensor is None else self._header(tensor)
        with self._turn(seconds):
            copy = None
            if tensor is not None:
                # On the caller's stream: behind what it has launched on the source, before what it launches next.
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                copy.copy_(tensor.detach())
            self._enqueue(Item(header, copy, now_on(self._device)))

    @contextlib.contextmanager
    def sending(self, shape: tuple[int, ...], dtype: torch.dtype, seconds: float) -> Iterator[torch.Tensor]:
        """Memory of the pipe for the block to write into; queued at the end of the block. Waits and raises as send."""
        header = self._header(torch.empty(shape, dtype=dtype, device="meta"))
        with self._turn(seconds):
            tensor = self._staging.take(shape, dtype)
            try:
                yield tensor
                self._enqueue(Item(header, tensor, now_on(self._device), staged=True))
            except BaseException:
                self._staging.give_back(tensor, now_on(self._device))
                raise

    def flush(self, seconds: float) -> None:
        """Returns once all that was queued has arrived. Raises KvPipeError."""
        with self._changed:
            self._changed.wait_for(lambda: not self._outgoing or self._error is not None, seconds)
            if self._loss is not None:
                raise KvPipeError(f"not everything was sent: {self._loss}") from self._loss
            if self._outgoing:
                raise KvPipeTimeoutError(f"{len(self._outgoing)} items were not sent within {seconds:g} s")

    def release_memory(self) -> None:
        """Gives back what sending has used and nothing needs now."""
        self._staging.clear()

    def close(self, seconds: float) -> None:
        """Sends what is queued and says that this is the end; breaks off after that many seconds. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._outgoing or self._error is not None, seconds)
            late = len(self._outgoing)
        if late:
            self._fail(KvPipeTimeoutError(f"{late} items were not sent within {seconds:g} s of close"))
        self._announcing.join()
        self._answering.join()
        self._staging.clear()

    def abort(self, reason: str) -> None:
        """Drops what is queued and breaks off what is on its way. From any thread; idempotent."""
        self._fail(KvPipeError(reason))

    # --------------------------------------------------------------------------------- the callers

    def _header(self, tensor: torch.Tensor) -> Header:
        header = tensor_header(tensor, 0)
        most = self._config.max_tensor_bytes
        if header.payload_bytes > most:
            raise ValueError(f"a tensor of {header.payload_bytes} bytes: at most {most} can be sent")
        return header

    @contextlib.contextmanager
    def _turn(self, seconds: float) -> Iterator[None]:
        """This caller's alone, once there is room."""
        deadline = time.monotonic() + seconds
        if not self._order.acquire(timeout=seconds):
            raise self._late(seconds)
        try:
            limit = self._config.send_limit_bytes
            with self._changed:
                self._changed.wait_for(
                    lambda: self._closing or self._error is not None or self._outgoing.bytes <= limit,
                    max(deadline - time.monotonic(), 0),
                )
                self._check()
                if self._outgoing.bytes > limit:
                    raise self._late(seconds)
            yield
        finally:
            self._order.release()

    def _late(self, seconds: float) -> KvPipeTimeoutError:
        return KvPipeTimeoutError(
            f"{self._outgoing.bytes} bytes are queued, more than {self._config.send_limit_bytes}, for {seconds:g} s"
        )

    def _check(self) -> None:
        if self._error is not None:
            raise KvPipeError(f"the pipe can't send any more: {self._error}") from self._error
        if self._closing:
            raise KvPipeClosedError("the pipe was closed")

    def _enqueue(self, item: Item) -> None:
        with self._changed:
            self._check()
            self._outgoing.add(item)
            self._changed.notify_all()

    # ---------------------------------------------------------------------------------- the threads

    def _guard(self, run: Callable[[], None]) -> None:
        try:
            with torch.inference_mode():
                run()
        except KvPipeError as error:
            self._end(error)
        except CommunicatorError as error:
            self._end(KvPipeError(f"item {self._outgoing.arrived}: {error}"))
        except Exception as error:  # The boundary: the next caller gets it.
            _logger.exception("the pipe can't send")
            self._end(KvPipeError(f"{type(error).__name__}: {error}"))

    def _announce_all(self) -> None:
        """Announces what is queued, and watches the clock of what is under way."""
        seconds = self._config.deadline_seconds
        while True:
            with self._changed:
                left = self._outgoing.seconds_left(seconds)
                self._changed.wait_for(self._can_announce, left)
                if self._error is not None:
                    return
                item = self._outgoing.announce()
                if item is None and self._closing and not self._outgoing:
                    break
                if item is None and self._outgoing.seconds_left(seconds) == 0:
                    raise KvPipeTimeoutError(f"the peer said nothing for {seconds:g} s")
            if item is not None:
                self._link.control.write(encode_header(item.header), seconds)
        self._end_announced = True
        self._link.control.write(encode_header(Header(ItemKind.END, self._outgoing.arrived)), _END_SECONDS)
        self._answering.join(_END_SECONDS)
        if self._answering.is_alive():
            raise KvPipeTimeoutError(f"the peer said nothing for {_END_SECONDS:g} s")

    def _can_announce(self) -> bool:
        return self._outgoing.unannounced > 0 or self._error is not None or (self._closing and not self._outgoing)

    def _answer_all(self) -> None:
        """Sends what the peer asks for, until it has heard the end."""
        seconds = self._config.deadline_seconds
        while True:
            reply = decode_reply(self._link.control.read(REPLY_BYTES, seconds, idle=True))
            if reply.kind is ReplyKind.REFUSED:
                raise KvPipeError(f"the peer refused item {reply.sequence}: {reply.text}")
            if self._is_end(reply):
                return
            if reply.kind is ReplyKind.GO:
                with self._changed:
                    item = self._outgoing.ask(reply.sequence)
                self._launch(item)
            else:
                self._arrived(reply.sequence)

    def _is_end(self, reply: Reply) -> bool:
        return self._end_announced and reply == Reply(ReplyKind.DONE, self._outgoing.arrived)

    def _launch(self, item: Item) -> None:
        tensor = item.tensor
        assert tensor is not None, "only what has bytes is asked for"
        if self._stream is None:
            self._link.data.broadcast(as_bytes(tensor), SENDER)
            return
        assert item.written is not None, "tensors on CUDA have an event"
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(item.written)
            # Its owner drops it once it has arrived there, when this end's kernel may not quite have ended.
            tensor.record_stream(self._stream)
            self._link.data.broadcast(as_bytes(tensor), SENDER)
            item.sent = now_on(self._device)

    def _arrived(self, sequence: int) -> None:
        with self._changed:
            item = self._outgoing.arrive(sequence)
            self._changed.notify_all()
        if item.staged and item.tensor is not None:
            self._staging.give_back(item.tensor, item.sent)

    def _end(self, error: KvPipeError) -> None:
        if self._end_announced and not isinstance(error, KvHeaderError):
            # Everything has arrived: the peer was closed first, or is gone.
            _logger.debug("the peer did not hear the end: %s", error)
            self._link.abort(str(error))
            return
        self._fail(error)

    def _fail(self, error: KvPipeError) -> None:
        with self._changed:
            if self._error is not None:
                return
            self._error = error
            self._loss = error if self._outgoing else None
            self._outgoing.clear()
            self._changed.notify_all()
        # Where nothing is lost the peer may just have closed first.
        _logger.log(logging.ERROR if self._loss else logging.DEBUG, "the pipe can't send any more: %s", error)
        self._link.abort(str(error))
