"""The indexed way of sending tensors: before each one the trainer says which it is. Nothing else is said about it.

The index is one int64; -1 is a sign of life, after which nothing follows, -2 the end. Any other number that is no
index is skipped. A tensor has the shape and dtype that the receiver's model has, as both sides know.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from tpmodel_worker.comm.communicator import CommunicatorAbortedError
from tpmodel_worker.weights.broadcast import Group, Progress, on_stream
from tpmodel_worker.weights.packing import DTYPES, TensorInfo, view_in
from tpmodel_worker.weights.ranks import TRAINER

HEARTBEAT = -1
STOP = -2
MAX_ERRORS = 5
"""So many in a row end the exchange."""
RETRY_SECONDS = 1.0
_ENDS = ("broken pipe", "connection reset", "connection closed")

_logger = logging.getLogger(__name__)


class TrainerStoppedError(Exception):
    """The trainer has ended the exchange, in order or not; the message says how."""


class ReceivingFailedError(Exception):
    """Too many errors in a row."""


class IndexedReceiver:
    """A rank's end, for one set of tensors after the other. Used by one thread at a time."""

    def __init__(
        self, group: Group, tensors: Sequence[TensorInfo], *, cancelled: threading.Event, retry_seconds: float
    ) -> None:
        """Takes the memory that it will need: as much as the largest tensor has.

        Args:
            group: of the data.
            tensors: the whole set; a tensor's index is its place.
            cancelled: set when nothing more shall be waited for.
            retry_seconds: the pause after an error.
        """
        self._group = group
        self._tensors = tensors
        self._cancelled = cancelled
        self._retry_seconds = retry_seconds
        # Of its own: plans go on meanwhile, where a second arena is filled.
        self._stream = torch.cuda.Stream(group.device) if group.device.type == "cuda" else None
        self._number = torch.zeros(1, dtype=torch.int64, device=group.device)
        largest = max((tensor.bytes for tensor in tensors), default=0)
        self._buffer = torch.empty(largest, dtype=torch.uint8, device=group.device)
        self._pending: int | None = None
        self._errors = 0

    def wait(self, progress: Progress) -> None:
        """Returns when the first index of a set has come; receive begins with it. Signs of life are progress.

        Raises:
            TrainerStoppedError: it sent -2, or its connection has ended.
            CommunicatorAbortedError: the group was aborted.
            ReceivingFailedError: there were too many errors.
        """
        with on_stream(self._stream):
            self._pending = self._next(lambda: progress(0))

    def receive(self, load: Callable[[str, torch.Tensor], None], progress: Progress) -> None:
        """Hands each tensor to load(name, tensor), a view that is overwritten later, until all of the set have come.

        One that comes again replaces the one before. Raises as wait.
        """
        missing = set(range(len(self._tensors)))
        done = 0

        def heard() -> None:
            progress(done)

        with on_stream(self._stream):
            while missing:
                index, self._pending = self._pending, None
                if index is None:
                    index = self._next(heard, missing)
                tensor = self._tensors[index]
                if not self._attempt(lambda tensor=tensor: self._receive(tensor, load)):
                    continue
                if index in missing:
                    missing.remove(index)
                    done += tensor.bytes
                    progress(done)
        if self._stream is not None:
            self._stream.synchronize()

    def _next(self, heard: Callable[[], None], missing: set[int] | None = None) -> int:
        """The next index of a tensor; missing: what a set that has begun still lacks."""
        while True:
            if not self._attempt(lambda: self._group.broadcast(self._number, TRAINER)):
                continue
            index = int(self._number.item())
            heard()
            if index == STOP:
                raise TrainerStoppedError("the trainer has stopped" + self._lack(missing))
            if index == HEARTBEAT:
                if missing:
                    _logger.info("the trainer pauses%s", self._lack(missing))
            elif not 0 <= index < len(self._tensors):
                _logger.warning("index %d is skipped: the model has tensors 0 to %d", index, len(self._tensors) - 1)
            else:
                return index

    def _receive(self, tensor: TensorInfo, load: Callable[[str, torch.Tensor], None]) -> None:
        view = view_in(self._buffer, tensor, 0)
        self._group.broadcast(view, TRAINER)
        load(tensor.name, view)

    def _attempt(self, work: Callable[[], object]) -> bool:
        """Whether it succeeded; after an error that need not be the end there is a pause."""
        try:
            work()
        except CommunicatorAbortedError:
            raise
        except Exception as error:  # Whatever it is, the next index may be right.
            if any(end in str(error).lower() for end in _ENDS):
                raise TrainerStoppedError(f"the trainer has gone: {error}") from error
            self._errors += 1
            if self._errors >= MAX_ERRORS:
                raise ReceivingFailedError(f"{self._errors} errors in a row, the last: {error}") from error
            _logger.exception("error %d of %d in a row", self._errors, MAX_ERRORS)
            self._cancelled.wait(self._retry_seconds)
            return False
        self._errors = 0
        return True

    def _lack(self, missing: set[int] | None) -> str:
        if not missing:
            return ""
        return f" in a set that lacks {len(missing)} tensors, the first is {self._tensors[min(missing)].name}"


class IndexedSender:
    """The trainer's end. For several threads: what one sends is whole before another's begins."""

    def __init__(self, group: Group, tensors: Sequence[TensorInfo]) -> None:
        """tensors: the whole set, as every receiver has it; a tensor's index is its place."""
        self._group = group
        self._tensors = tensors
        self._indices = {tensor.name: index for index, tensor in enumerate(tensors)}
        self._lock = threading.Lock()

    def send(self, name: str, tensor: torch.Tensor) -> None:
        """Sends one tensor, converted to the model's dtype.

        Raises:
            ValueError: the model has no such tensor, or one of another shape; nothing was sent.
            CommunicatorError: a receiver has gone.
        """
        index = self._indices.get(name)
        if index is None:
            raise ValueError(f"the model has no tensor {name}: names are the checkpoint's, tied ones are not sent")
        info = self._tensors[index]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the model has {info.shape}")
        payload = tensor.detach().to(device=self._group.device, dtype=DTYPES[info.dtype]).contiguous()
        with self._lock:
            self._say(index)
            self._group.broadcast(payload, TRAINER)

    def heartbeat(self) -> None:
        """Says that the trainer is alive, so that nobody's collective runs out of time."""
        with self._lock:
            self._say(HEARTBEAT)

    def stop(self) -> None:
        """Ends the exchange for all receivers."""
        with self._lock:
            self._say(STOP)

    def _say(self, number: int) -> None:
        self._group.broadcast(torch.tensor([number], dtype=torch.int64, device=self._group.device), TRAINER)
