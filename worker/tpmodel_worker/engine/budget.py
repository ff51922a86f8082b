"""How many rebuilds a gang may take before its pods are restarted, and how long to wait before each."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 10.0


class RebuildBudget:
    """Counts rebuilds in a file, so that a restarted engine or container goes on counting.

    A world that has served for the stability window gives the whole budget back. Rebuilds in a row that
    bring no progress come after growing pauses; the first comes at once. Times are unix seconds.
    """

    def __init__(self, path: Path, *, attempt: int, limit: int, stability_window: float) -> None:
        """path: the file; what it says of another attempt, or unreadably, counts for nothing."""
        self._path = path
        self._attempt = attempt
        self._limit = limit
        self._stability_window = stability_window
        self._in_a_row = 0
        self._spent, self._serving_since = self._read()

    @property
    def left(self) -> int:
        """Rebuilds that are still allowed."""
        return max(0, self._limit - self._spent)

    @property
    def limit(self) -> int:
        """Rebuilds of a whole budget."""
        return self._limit

    @property
    def world_was_lost(self) -> bool:
        """Whether a world of this attempt served when the file was last written: its engine is gone since."""
        return self._serving_since > 0

    def spend(self, now: float) -> float | None:
        """Takes one rebuild; seconds to wait before it, or None: none is left."""
        if self._serving_since and now - self._serving_since >= self._stability_window:
            self._spent = 0
        self._serving_since = 0.0
        if self._spent >= self._limit:
            self._write()
            return None
        self._spent += 1
        self._write()
        pause = min(FIRST_PAUSE_SECONDS * 2 ** (self._in_a_row - 1), LONGEST_PAUSE_SECONDS) if self._in_a_row else 0.0
        self._in_a_row += 1
        return pause

    def serving(self, now: float) -> None:
        """A world begins to serve."""
        self._serving_since = now
        self._write()

    def progress(self) -> None:
        """What the lost world was doing goes on: the next fault is one for itself."""
        self._in_a_row = 0

    def _read(self) -> tuple[int, float]:
        try:
            stored = json.loads(self._path.read_text())
            if stored["attempt"] != self._attempt:
                return 0, 0.0
            return int(stored["spent"]), float(stored["serving_since"])
        except FileNotFoundError:
            return 0, 0.0
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s counts no rebuilds: %s", self._path, error)
            return 0, 0.0

    def _write(self) -> None:
        values = {"attempt": self._attempt, "spent": self._spent, "serving_since": self._serving_since}
        new = self._path.with_suffix(".new")
        try:
            new.write_text(json.dumps(values))
            new.replace(self._path)
        except OSError as error:
            logger.warning("the count of rebuilds is not kept: %s", error)
