"""What a rank says about itself, kept where every thread can read it without waiting for the computing one."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from tpmodel.v1 import worker_pb2 as pb


class StatusBoard:
    """The GetStatus answer and the busy report. The computing thread writes, the I/O thread reads."""

    def __init__(self, *, rank: int, device: str, threads: int) -> None:
        self._lock = threading.Lock()
        self._status = pb.GetStatusResponse(rank=rank, pid=os.getpid(), device=device, threads=threads, state="idle")
        self._busy: pb.Busy | None = None

    def update(self, **fields: Any) -> None:
        """Sets fields of GetStatusResponse by name."""
        with self._lock:
            for name, value in fields.items():
                setattr(self._status, name, value)

    def progress(self, progress: pb.Progress | None) -> None:
        """Sets how far a load is, or clears it."""
        with self._lock:
            if progress is None:
                self._status.ClearField("progress")
            else:
                self._status.progress.CopyFrom(progress)

    def weight_update(self, state: pb.WeightUpdateStatus) -> None:
        """Sets how far a weight update's thread is."""
        with self._lock:
            self._status.weight_update.CopyFrom(state)

    def persist(self, state: pb.PersistStatus) -> None:
        """Sets which weights are kept in a file."""
        with self._lock:
            self._status.persist.CopyFrom(state)

    def busy(self, what: str, seconds: float) -> None:
        """Announces a compilation or capture that may last so long."""
        with self._lock:
            self._busy = pb.Busy(what=what, until=time.time() + seconds)

    def not_busy(self) -> None:
        """Ends the announcement."""
        with self._lock:
            self._busy = None

    def status(self) -> pb.GetStatusResponse:
        """A copy of the status."""
        copy = pb.GetStatusResponse()
        with self._lock:
            copy.CopyFrom(self._status)
        return copy

    def ping(self, epoch: int) -> pb.PingResponse:
        """The Ping answer."""
        with self._lock:
            return pb.PingResponse(rank=self._status.rank, epoch=epoch, busy=self._busy)
