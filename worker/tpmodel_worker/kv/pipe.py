"""A pipe for optional tensors between two processes (or a ring of more), beside any other process group.

Nothing is pickled, no default process group is made. See docs/kv.md for what goes over the wire.
"""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvHeaderError, KvPipeClosedError, KvPipeError, KvPipeTimeoutError
from tpmodel_worker.kv.link import connect_links
from tpmodel_worker.kv.receiver import Receiver
from tpmodel_worker.kv.sender import Sender

__all__ = [
    "KvHeaderError",
    "KvPipe",
    "KvPipeClosedError",
    "KvPipeConfig",
    "KvPipeError",
    "KvPipeTimeoutError",
]


class KvPipe:
    """One member's end. send and receive may be called from any thread; a context manager."""

    def __init__(
        self, config: KvPipeConfig, *, store: TCPStore | None = None, cancelled: threading.Event | None = None
    ) -> None:
        """Connects; returns once every member has.

        Args:
            config: of this member.
            store: of member 0, where it was started before to learn its port; None: it is started now.
            cancelled: another thread may set it to end the connecting.

        Raises:
            KvPipeError: not all came within config.store_timeout_seconds, or somebody has another token.
        """
        self._config = config
        links = connect_links(config, store, cancelled or threading.Event())
        self._store = links.store
        self._links = (links.outgoing, links.incoming)
        self._sender = Sender(links.outgoing, config)
        self._receiver = Receiver(links.incoming, config)
        self._close_lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def queued_bytes(self) -> int:
        """Bytes of tensors given to send that have not arrived yet."""
        return self._sender.queued_bytes

    @property
    def ready_bytes(self) -> int:
        """Bytes of tensors that have come and were not taken by receive yet."""
        return self._receiver.ready_bytes

    @property
    def broken(self) -> bool:
        """One of the directions carries nothing any more, for whatever reason."""
        return self._sender.error is not None or self._receiver.ended is not None

    def send(self, tensor: torch.Tensor | None, timeout_seconds: float | None = None) -> None:
        """Queues a copy of the tensor, or that there is none, and returns.

        The source may be overwritten once this returns; on CUDA by work on the stream that is current here,
        or ordered behind it.

        Args:
            tensor: on any device; any layout.
            timeout_seconds: how long to wait while more than config.send_limit_bytes are queued; None:
                config.deadline_seconds.

        Raises:
            ValueError: the dtype, the number of dimensions or the size can't be sent; the pipe is as before.
            KvPipeTimeoutError: the queue stayed over its limit for that long; nothing was queued.
            KvPipeError: an item before this one could not be sent; the direction is broken.
            KvPipeClosedError: the pipe was closed.
        """
        self._sender.send(tensor, self._seconds(timeout_seconds))

    def sending(
        self, shape: tuple[int, ...], dtype: torch.dtype, timeout_seconds: float | None = None
    ) -> contextlib.AbstractContextManager[torch.Tensor]:
        """Memory of the pipe for a block to write into, which is queued at the block's end: nothing is copied.

        On CUDA the block writes on the stream that is current there. The memory is used again, so that nothing may
        touch it after the block. A block that raises queues nothing. Nothing else may be sent within a block.

        Args:
            shape, dtype: of the tensor, which is contiguous, on this end's device, and holds anything at first.
            timeout_seconds: as for send. Raises as send, and RuntimeError where there is no memory.
        """
        return self._sender.sending(shape, dtype, self._seconds(timeout_seconds))

    def receive(self, timeout_seconds: float | None = None) -> torch.Tensor | None:
        """What the peer sent next: a tensor on this end's device, or None where it sent None.

        Args:
            timeout_seconds: how long to wait; None: config.deadline_seconds.

        Raises:
            KvPipeTimeoutError: nothing came in time; a later call may still get it.
            KvHeaderError: what came is no header.
            KvPipeClosedError: this end or the peer's was closed, or the peer is gone.
            KvPipeError: the transfer failed. This and the two before it are raised again by every later call.
        """
        return self._receiver.receive(self._seconds(timeout_seconds))

    def receiving(self, timeout_seconds: float | None = None) -> contextlib.AbstractContextManager[torch.Tensor | None]:
        """As receive, for a block in whose memory later items come: nothing may touch the tensor after the block.

        On CUDA the block reads on the stream that is current there. Raises as receive.
        """
        return self._receiver.receiving(self._seconds(timeout_seconds))

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Returns once everything that was given to send has arrived.

        Raises:
            KvPipeTimeoutError: not within that many seconds; None: config.deadline_seconds.
            KvPipeError: something could not be sent.
        """
        self._sender.flush(self._seconds(timeout_seconds))

    def release_memory(self) -> None:
        """Gives back what sending and receiving keep for their next use. From any thread."""
        self._sender.release_memory()
        self._receiver.release_memory()

    def close(self) -> None:
        """Sends what is queued, within config.deadline_seconds, and gives everything back. Idempotent.

        Raises:
            KvPipeError: something that was given to send has not arrived. Everything is given back all the same.
        """
        with self._close_lock:
            if self._closed:
                return
            self._closed = True
            self._sender.close(self._config.deadline_seconds)
            self._receiver.close()
            for link in self._links:
                link.close()
            self._store = None
            if self._sender.loss is not None:
                raise KvPipeError(f"not everything was sent: {self._sender.loss}") from self._sender.loss

    def abort(self, reason: str) -> None:
        """Breaks both directions off: what waits in send or receive raises, what is queued is dropped.

        From any thread; idempotent. close gives everything back.
        """
        self._sender.abort(reason)
        self._receiver.abort(reason)

    def _seconds(self, timeout_seconds: float | None) -> float:
        return self._config.deadline_seconds if timeout_seconds is None else timeout_seconds
