"""Generations: each source of reasons for a new world counts them by itself, and only a rise means anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

LOOK_SECONDS = 1.0

RiseListener = Callable[[str, int], None]
"""Called with a source and its new generation."""


class Generations:
    """The newest generation of every source."""

    def __init__(self, on_rise: RiseListener) -> None:
        self._on_rise = on_rise
        self._newest: dict[str, int] = {}

    def newest(self, source: str) -> int:
        """The highest that the source has told of; 0 before."""
        return self._newest.get(source, 0)

    def begin(self, source: str, generation: int) -> None:
        """What a watch found when it began: recorded, and no news (W27)."""
        self._newest[source] = max(generation, self.newest(source))

    def observe(self, source: str, generation: int) -> bool:
        """True, and the listener is told, when it is above all that the source told of before (W25)."""
        if generation <= self.newest(source):
            return False
        self._newest[source] = generation
        self._on_rise(source, generation)
        return True


async def watch(
    read: Callable[[], int | None], source: str, generations: Generations, *, look_seconds: float = LOOK_SECONDS
) -> None:
    """Looks at a source now and then, in a thread, and tells of every rise; runs until cancelled.

    read: the source's generation; None: it says nothing. What the first look finds is no news.
    """
    generations.begin(source, await asyncio.to_thread(read) or 0)
    while True:
        await asyncio.sleep(look_seconds)
        found = await asyncio.to_thread(read)
        if found is not None:
            generations.observe(source, found)
