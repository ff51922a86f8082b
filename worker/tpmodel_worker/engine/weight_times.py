"""What the time of a live weight update goes into, as the engine sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator

from tpmodel.v1 import weights_pb2
from tpmodel_worker.engine.metrics import EngineMetrics

TRAINER = "trainer"
"""The phase between two calls of the trainer's."""
_FIRST_STEP = "first_step"


class UpdateTimes:
    """Adds up the seconds of each phase; a phase ends where the next begins."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._seconds: dict[str, float] = {}
        self._phase = ""
        self._since = 0.0

    def start(self, phase: str) -> None:
        """An update begins, with this phase."""
        self._seconds.clear()
        self._phase = ""
        self.begin(phase)

    def begin(self, phase: str) -> None:
        """Ends the phase before; a phase that comes again goes on."""
        now = time.monotonic()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def finish(self) -> str:
        """The update went well; what it went into, for the log."""
        self.begin("")
        for phase, seconds in self._seconds.items():
            self._metrics.weight_update_phase_seconds.labels(phase).observe(seconds)
        return ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in self._seconds.items())

    def first_step(self, seconds: float) -> None:
        """From the end of the pause to the first token of the new weights: its prompt was computed again."""
        self._metrics.weight_update_phase_seconds.labels(_FIRST_STEP).observe(seconds)

    @property
    def phases(self) -> Iterator[weights_pb2.UpdatePhase]:
        """Those that are over."""
        return (weights_pb2.UpdatePhase(name=name, seconds=seconds) for name, seconds in self._seconds.items())
