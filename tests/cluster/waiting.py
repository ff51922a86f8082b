"""Waiting with a deadline and an explanation."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from .errors import ClusterError

T = TypeVar("T")
INTERVAL_SECONDS = 0.1


def wait_until(
    condition: Callable[[], T | None],
    *,
    what: str,
    seconds: float,
    explain: Callable[[], str] = str,
    interval: float = INTERVAL_SECONDS,
) -> T:
    """Returns the condition's first true value; past the deadline, raises with `what` and the explanation."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise ClusterError(f"{what}: not within {seconds:.0f} s\n{explain()}".rstrip())
        time.sleep(interval)
