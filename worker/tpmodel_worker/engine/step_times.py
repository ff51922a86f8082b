"""How long decode steps take, by batch size."""

from __future__ import annotations

NEWEST_WEIGHT = 0.25
"""What the newest step counts in the running mean."""


class StepTimes:
    """Running means of decode steps' seconds, for batches between powers of two."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def record(self, batch_size: int, seconds: float) -> None:
        """Takes one executed step into account."""
        bucket = (batch_size - 1).bit_length()
        mean = self._means.get(bucket)
        self._means[bucket] = seconds if mean is None else mean + NEWEST_WEIGHT * (seconds - mean)

    def steps_within(self, batch_size: int, seconds: float, most: int) -> int:
        """How many steps are expected to fit: from 1 to `most`; 1 while nothing is known of such batches."""
        mean = self._means.get((batch_size - 1).bit_length())
        if mean is None:
            return 1
        if mean * most <= seconds:
            return most
        return max(1, int(seconds / mean))
