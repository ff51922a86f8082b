"""What a pipe's sender has been given and the peer has not got yet, and how far each of it is. No thread of its own."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from dataclasses import dataclass

import torch

from tpmodel_worker.kv.errors import KvHeaderError
from tpmodel_worker.kv.header import Header


@dataclass(slots=True, eq=False)
class Item:
    """One tensor, or that there is none."""

    header: Header
    """Numbered when it is added."""
    tensor: torch.Tensor | None
    """On the pipe's device, contiguous, the pipe's own."""
    written: torch.cuda.Event | None
    """On CUDA: when its content is there."""
    staged: bool = False
    """Its memory is used again."""
    sent: torch.cuda.Event | None = None
    """On CUDA: when this end does not need it any more."""

    @property
    def bytes(self) -> int:
        """That follow the header."""
        return self.header.payload_bytes


class Outgoing:
    """Queued, then announced, then (if it has bytes) asked for, then arrived: always in the order of `add`."""

    def __init__(self) -> None:
        self.bytes = 0
        """Of everything that has not arrived."""
        self.arrived = 0
        """How many have arrived so far: the number of the oldest that has not."""
        self._queued: deque[Item] = deque()
        self._announced: deque[Item] = deque()
        self._unasked: deque[Item] = deque()
        """Announced, with bytes, and not asked for."""
        self._added = 0
        self._heard = 0.0

    def __len__(self) -> int:
        return len(self._queued) + len(self._announced)

    @property
    def unannounced(self) -> int:
        """Items that wait to be announced."""
        return len(self._queued)

    def add(self, item: Item) -> None:
        """Numbers it and puts it behind all others."""
        item.header = dataclasses.replace(item.header, sequence=self._added)
        self._added += 1
        self._queued.append(item)
        self.bytes += item.bytes

    def announce(self) -> Item | None:
        """The next one, whose header is about to be written; None: all are announced."""
        if not self._queued:
            return None
        item = self._queued.popleft()
        if not self._announced:
            self._heard = time.monotonic()
        self._announced.append(item)
        if item.bytes:
            self._unasked.append(item)
        return item

    def ask(self, sequence: int) -> Item:
        """The peer asks for it. Raises KvHeaderError when it is not the next one that has bytes."""
        self._heard = time.monotonic()
        if not self._unasked or self._unasked[0].header.sequence != sequence:
            raise KvHeaderError(f"the peer asked for item {sequence}, which is not the next one")
        return self._unasked.popleft()

    def arrive(self, sequence: int) -> Item:
        """The peer has it. Raises KvHeaderError when that can't be."""
        self._heard = time.monotonic()
        item = self._announced[0] if self._announced else None
        if item is None or sequence != self.arrived or (self._unasked and self._unasked[0] is item):
            raise KvHeaderError(f"the peer says that it has item {sequence}, which can't be")
        self._announced.popleft()
        self.arrived += 1
        self.bytes -= item.bytes
        return item

    def seconds_left(self, seconds: float) -> float | None:
        """Until the peer has said nothing for that many seconds; None: nothing is announced, so it need not."""
        return max(self._heard + seconds - time.monotonic(), 0) if self._announced else None

    def clear(self) -> None:
        """Nothing arrives any more."""
        for items in (self._queued, self._announced, self._unasked):
            items.clear()
        self.bytes = 0
