"""Which generations are news (W25, W27)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tpmodel_worker.engine.generations import Generations, watch

Rises = list[tuple[str, int]]


def generations() -> tuple[Generations, Rises]:
    rises: Rises = []
    return Generations(lambda source, generation: rises.append((source, generation))), rises


def test_only_a_rise_is_news() -> None:
    """W25: a generation that is not above the last seen is ignored; each source counts for itself."""
    seen, rises = generations()
    assert seen.observe("user", 3)
    assert not seen.observe("user", 3)
    assert not seen.observe("user", 2)
    assert seen.observe("operator", 1)
    assert seen.observe("user", 7)
    assert rises == [("user", 3), ("operator", 1), ("user", 7)]
    assert (seen.newest("user"), seen.newest("nobody")) == (7, 0)


def test_where_a_watch_begins_is_no_news() -> None:
    """W27: the initial value is silent."""
    seen, rises = generations()
    seen.begin("operator", 5)
    assert not seen.observe("operator", 5)
    assert seen.observe("operator", 6)
    seen.begin("operator", 2)
    assert not seen.observe("operator", 6)
    assert rises == [("operator", 6)]


async def looked_at(values: list[int | None]) -> Rises:
    """What follows from a source that says this at one look after the other."""
    seen, rises = generations()
    looks = iter(values)
    over = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read() -> int | None:
        try:
            return next(looks)
        except StopIteration:
            loop.call_soon_threadsafe(over.set)
            return None

    watching = asyncio.create_task(watch(read, "operator", seen, look_seconds=0.001))
    await asyncio.wait_for(over.wait(), 10)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    return rises


async def test_a_watch_tells_of_rises_once_and_of_nothing_else() -> None:
    """W27: initial value silent, duplicates suppressed."""
    assert await looked_at([4, 4, 5, 5, None, 5, 3, 8]) == [("operator", 5), ("operator", 8)]


async def test_a_source_that_says_nothing_at_first_begins_at_0() -> None:
    assert await looked_at([None, None, 1]) == [("operator", 1)]


async def test_a_rise_by_more_than_one_is_one() -> None:
    assert await looked_at([1, 9]) == [("operator", 9)]


def test_the_listener_finds_the_newest_recorded() -> None:
    """A request that comes while another is being answered is measured by it."""
    found: list[int] = []
    holder: list[Callable[[], int]] = []
    seen = Generations(lambda source, generation: found.append(holder[0]()))
    holder.append(lambda: seen.newest("user"))
    seen.observe("user", 2)
    assert found == [2]
