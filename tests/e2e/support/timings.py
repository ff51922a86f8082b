"""How long the cluster took to get over each fault: measured by the tests, printed at the end of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class Timings:
    """What was measured so far."""

    _seconds: dict[tuple[str, str], float] = field(default_factory=dict)

    def note(self, fault: str, until: str, seconds: float) -> None:
        """After this fault it took so long until that."""
        self._seconds[fault, until] = seconds

    def lines(self) -> Iterator[str]:
        """A table; nothing where nothing was measured."""
        if not self._seconds:
            return
        width = max(len(fault) for fault, _ in self._seconds)
        yield f"{'fault':<{width}}  {'seconds':>7}  until"
        for (fault, until), seconds in self._seconds.items():
            yield f"{fault:<{width}}  {seconds:7.1f}  {until}"


TIMINGS = pytest.StashKey[Timings]()
"""Where the run keeps them."""


class Stopwatch:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since then."""
        return time.monotonic() - self._began
