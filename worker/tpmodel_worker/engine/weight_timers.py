"""A trainer that says nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class SilenceTimer:
    """Runs while no call of the trainer's is under way, so that a silent one does not keep the gang paused."""

    def __init__(self, on_silence: Callable[[], None]) -> None:
        """on_silence: called when the trainer has said nothing for as long as start said."""
        self._on_silence = on_silence
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """Begins to wait, unless it does."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._on_silence)

    def stop(self) -> None:
        """A call has come, or nobody waits for one. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
