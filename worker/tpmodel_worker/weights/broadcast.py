"""The two ends of the tensors' way: trainer to all ranks, one broadcast after the other.

Packed, a few buffers are used in turn: on CUDA the next one is filled (or emptied) on a stream of its own
while the one before is on its way. Both ends return only when their streams are empty.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from tpmodel_worker.weights.packing import Chunk, TensorInfo, plan_chunks, view_in
from tpmodel_worker.weights.ranks import TRAINER

_POLL_SECONDS = 0.0005

Progress = Callable[[int], None]
"""Called with the bytes that have been handed over so far."""


class Group(Protocol):
    """What is needed of the update group."""

    device: torch.device

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        """Overwrites the tensor by the root's, in place."""
        ...


class Broadcaster:
    """One end's buffers and streams, for one sequence of tensors."""

    def __init__(self, group: Group, tensors: Sequence[TensorInfo], *, buffer_size: int, buffer_count: int) -> None:
        """Takes the memory that it will need beside the weights: buffer_size 0 means one tensor at a time."""
        self._group = group
        self._chunks = plan_chunks(tensors, buffer_size)
        largest = max((chunk.bytes for chunk in self._chunks), default=0)
        count = min(max(buffer_count, 1), len(self._chunks))
        self._buffers = [torch.empty(largest, dtype=torch.uint8, device=group.device) for _ in range(count)]
        self._cuda = group.device.type == "cuda"

    @property
    def total_bytes(self) -> int:
        """Bytes of all broadcasts."""
        return sum(chunk.bytes for chunk in self._chunks)

    def send(self, tensor: Callable[[str], torch.Tensor], progress: Progress, deadline_seconds: float) -> None:
        """Sends every tensor; tensor(name) is asked once for each, in order.

        Raises:
            CommunicatorError: the group failed or was aborted.
            TimeoutError: the device has not finished in time.
        """
        work, wire = self._streams()
        if work is not None:
            # What the caller has launched may still write the tensors.
            work.wait_stream(torch.cuda.current_stream(self._group.device))
        done = 0
        for chunk, buffer, free in self._turns():
            with on_stream(work):
                free.wait()
                for info, offset in chunk.places:
                    source = tensor(info.name)
                    view_in(buffer, info, offset).copy_(source)
                    if work is not None and source.is_cuda:
                        # The caller may let go of it before the copy has run.
                        source.record_stream(work)
                free.record()
            with on_stream(wire):
                free.wait()
                self._broadcast(buffer, chunk)
                free.record()
            done += chunk.bytes
            progress(done)
        self._drain((work, wire), deadline_seconds)

    def receive(self, load: Callable[[str, torch.Tensor], None], progress: Progress, deadline_seconds: float) -> None:
        """Hands every tensor to load(name, tensor): a view of a buffer, which is overwritten later.

        Raises as send.
        """
        work, wire = self._streams()
        done = 0
        for chunk, buffer, free in self._turns():
            with on_stream(wire):
                free.wait()
                self._broadcast(buffer, chunk)
                free.record()
            with on_stream(work):
                free.wait()
                for info, offset in chunk.places:
                    load(info.name, view_in(buffer, info, offset))
                free.record()
            done += chunk.bytes
            progress(done)
        self._drain((work, wire), deadline_seconds)

    def _broadcast(self, buffer: torch.Tensor, chunk: Chunk) -> None:
        if chunk.bytes:
            self._group.broadcast(buffer[: chunk.bytes], TRAINER)

    def _streams(self) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
        """One for copies between tensors and buffers, one for the broadcasts."""
        if not self._cuda:
            return None, None
        return torch.cuda.Stream(self._group.device), torch.cuda.Stream(self._group.device)

    def _turns(self) -> Iterator[tuple[Chunk, torch.Tensor, _Turn]]:
        turns = [_Turn(self._cuda) for _ in self._buffers]
        for number, chunk in enumerate(self._chunks):
            place = number % len(self._buffers)
            yield chunk, self._buffers[place], turns[place]

    def _drain(self, streams: Sequence[torch.cuda.Stream | None], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for stream in streams:
            while stream is not None and not stream.query():
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"the device has not finished its part within {seconds:g} s")
                time.sleep(_POLL_SECONDS)


class _Turn:
    """Who used a buffer last, on CUDA: the next user's stream waits for it."""

    def __init__(self, cuda: bool) -> None:
        self._event = torch.cuda.Event() if cuda else None
        self._recorded = False

    def wait(self) -> None:
        if self._event is not None and self._recorded:
            self._event.wait()

    def record(self) -> None:
        if self._event is not None:
            self._event.record()
            self._recorded = True


def on_stream(stream: torch.cuda.Stream | None) -> contextlib.AbstractContextManager[object]:
    """Work inside is launched on the stream; None: there are none, on CPU."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)
