"""What the time between the loss of a world and the next one goes into."""

from __future__ import annotations

import time

from tpmodel.v1 import worker_pb2

_LONGEST_CAUSE = 500


class RebuildTimes:
    """Adds up the seconds of each phase of one rebuild; a phase ends where the next begins."""

    def __init__(self, kind: str, cause: str, *, unix_seconds: float) -> None:
        """kind, cause: of the fault, which was detected at unix_seconds, now."""
        self._rebuild = worker_pb2.Rebuild(unix_seconds=unix_seconds, kind=kind, cause=cause[:_LONGEST_CAUSE])
        self._started = self._since = time.monotonic()
        self._phase = "abort"
        self._seconds: dict[str, float] = {}

    def explain(self, kind: str, cause: str) -> None:
        """More is known of the fault by now."""
        self._rebuild.kind, self._rebuild.cause = kind, cause[:_LONGEST_CAUSE]

    @property
    def seconds(self) -> float:
        """Since the fault was detected."""
        return time.monotonic() - self._started

    def begin(self, phase: str) -> None:
        """Ends the phase before; a phase that comes again goes on."""
        now = time.monotonic()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def finish(self, *, epoch: int, replayed_requests: int, builds: int) -> worker_pb2.Rebuild:
        """The whole account; nothing may follow."""
        self.begin("")
        rebuild = self._rebuild
        rebuild.epoch, rebuild.replayed_requests, rebuild.builds = epoch, replayed_requests, builds
        rebuild.seconds = self.seconds
        for name, seconds in self._seconds.items():
            rebuild.phases.add(name=name, seconds=seconds)
        return rebuild
