"""Waiting for what comes by itself: for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
INTERVAL_SECONDS = 0.02


def until(condition: Callable[[], T], what: str, seconds: float = 60.0) -> T:
    """Returns the condition's first true value. Raises AssertionError, which says `what`, past the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(INTERVAL_SECONDS)
    return value
