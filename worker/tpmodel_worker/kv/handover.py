"""One transfer on one rank, of a request or of the weights: a thread of its own, and the pipes that it holds."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.pipe import KvPipe
from tpmodel_worker.kv.pipe_pool import Lasting, PipePool

_JOIN_SECONDS = 10.0

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank's part has ended."""

    error: str
    """Empty: everything has arrived."""
    bytes: int
    seconds: float


class Handover:
    """Until its thread has ended. Methods from any thread."""

    def __init__(self, name: str, pool: PipePool[KvPipe]) -> None:
        """pool: where pipes go that are whole at the end."""
        self.name = name
        self.outcome: Future[Outcome] = Future()
        # From here on nobody who waits for it can cancel it.
        self.outcome.set_running_or_notify_cancel()
        self._pool = pool
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._reason = ""
        self._pipes: list[Lasting[KvPipe]] = []
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], int]) -> None:
        """Runs job, which returns the bytes that it has moved, and gives its pipes back."""
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"handover {self.name}", daemon=True)
        self._thread.start()

    def open(self, config: KvPipeConfig, store: TCPStore | None, *, name: str, peer: str, closes: bool) -> KvPipe:
        """A new pipe; the rest as in Lasting. Raises KvPipeError."""
        started = time.perf_counter()
        pipe = KvPipe(config, store=store, cancelled=self._cancelled)
        _logger.info("handover %s: a pipe was opened in %.3f s", self.name, time.perf_counter() - started)
        lasting = Lasting(name, peer, pipe, closes)
        self._pool.lend(lasting)
        self.adopt(lasting)
        return pipe

    def adopt(self, lasting: Lasting[KvPipe]) -> None:
        """Takes over a pipe, which cancel breaks off from now on."""
        with self._lock:
            self._pipes.append(lasting)
        if self._cancelled.is_set():
            lasting.pipe.abort(self._reason)

    def cancel(self, reason: str) -> None:
        """Breaks it off; the thread ends soon after. Idempotent."""
        with self._lock:
            self._reason = self._reason or reason
            self._cancelled.set()
            pipes = list(self._pipes)
        for lasting in pipes:
            lasting.pipe.abort(reason)

    def check(self) -> None:
        """For jobs that work for long without a pipe. Raises KvPipeError once it was cancelled."""
        if self._cancelled.is_set():
            raise KvPipeError(self._reason)

    def wait(self) -> bool:
        """Waits for the end of one that was cancelled; False when it does not come."""
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    @contextlib.contextmanager
    def stream(self, device: torch.device, after: torch.cuda.Event | None) -> Iterator[None]:
        """On CUDA a stream of its own behind that event; at the end everything on it is done."""
        if after is None:
            yield
            return
        with torch.cuda.device(device):
            stream = torch.cuda.Stream(device)
            try:
                with torch.cuda.stream(stream):
                    stream.wait_event(after)
                    yield
            except Exception as error:
                # It may wait for a kernel of a pipe, which only its abort ends.
                self.cancel(str(error))
                raise
            finally:
                stream.synchronize()

    def give_up(self, reason: str) -> None:
        """Breaks it off and ends its pipes."""
        self.cancel(reason)
        for lasting in self._take_pipes():
            self._pool.end(lasting, reason)

    def _run(self, job: Callable[[], int]) -> None:
        started = time.perf_counter()
        error, moved = "", 0
        try:
            # The cache is inference tensors: they may be written in this mode only, which belongs to a thread.
            with torch.inference_mode():
                moved = job()
            self._keep_pipes()
        except (KvPipeError, CommunicatorError) as failure:
            error = self._reason or str(failure)
            _logger.warning("handover %s: %s", self.name, error)
        except Exception as failure:  # The boundary: the engine gets it.
            error = f"{type(failure).__name__}: {failure}"
            _logger.exception("handover %s failed", self.name)
        if error:
            self.give_up(error)
        self.outcome.set_result(Outcome(error, moved, time.perf_counter() - started))

    def _keep_pipes(self) -> None:
        """Everything has arrived: the pipes are others' from now on. Raises KvPipeError where that is not so."""
        for lasting in self._pipes:
            lasting.pipe.flush()
            lasting.pipe.release_memory()
        for lasting in self._take_pipes(unless_cancelled=True):
            if lasting.peer:
                self._pool.put(lasting)
            else:
                self._pool.end(lasting)

    def _take_pipes(self, *, unless_cancelled: bool = False) -> list[Lasting[KvPipe]]:
        """What cancel does not reach any more. Raises KvPipeError where it was first."""
        with self._lock:
            if unless_cancelled and self._cancelled.is_set():
                raise KvPipeError(self._reason)
            pipes, self._pipes = self._pipes, []
        return pipes
