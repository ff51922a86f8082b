"""One queue of TPModels that need a pass: each waits at most once, and is never with two workers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import IntEnum

from tpmodel_operator.kube import ApiError

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.25
LONGEST_BACKOFF_SECONDS = 60.0


@dataclass(frozen=True, slots=True, order=True)
class Key:
    """A TPModel."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Urgency(IntEnum):
    """What is served first: an answer to a fault does not wait for new models, and these not for what is shown."""

    FAULT = 0
    SPEC = 1
    OTHER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One key handed to a worker."""

    key: Key
    queued: float
    """When it began to wait, by the queue's clock."""
    event: float | None = None
    """When the oldest alarming event arrived that this pass is the first to see; None: there was none."""
    urgency: Urgency = Urgency.OTHER


def backoff(failures: int) -> float:
    """Seconds until the next try after so many failures in a row."""
    return min(FIRST_BACKOFF_SECONDS * 2 ** min(failures - 1, 32), LONGEST_BACKOFF_SECONDS)


class WorkQueue:
    """Keys wait by urgency, and within one in order of arrival."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._waiting: dict[Urgency, OrderedDict[Key, Turn]] = {urgency: OrderedDict() for urgency in Urgency}
        self._running: set[Key] = set()
        self._again: dict[Key, Turn] = {}
        self._timers: dict[Key, asyncio.TimerHandle] = {}
        self._failures: dict[Key, int] = {}
        self._available = asyncio.Event()
        self._closed = False

    @property
    def depth(self) -> int:
        """Keys that wait."""
        return sum(map(len, self._waiting.values())) + len(self._again)

    def add(self, key: Key, urgency: Urgency = Urgency.OTHER, *, event: float | None = None) -> None:
        """A pass is needed as soon as possible; event: when a fault was heard of."""
        turn = Turn(key=key, queued=self._clock(), event=event, urgency=urgency)
        if key in self._running:
            self._again[key] = _merged(self._again.get(key), turn)
        else:
            self._wait(_merged(self._unwait(key), turn))

    def schedule(self, key: Key, delay: float) -> None:
        """A pass is needed after the delay; takes the place of what was scheduled for the key before."""
        self._unschedule(key)
        self._timers[key] = asyncio.get_running_loop().call_later(delay, self._due, key)

    async def get(self) -> Turn | None:
        """The next key, which is the caller's until done(); None once the queue is closed."""
        while not self._closed:
            if waiting := next(filter(None, self._waiting.values()), None):
                _, turn = waiting.popitem(last=False)
                self._running.add(turn.key)
                return turn
            self._available.clear()
            await self._available.wait()
        return None

    def done(self, key: Key) -> None:
        """The pass is over; what came in meanwhile makes the next one."""
        self._running.discard(key)
        if again := self._again.pop(key, None):
            self._wait(again)

    def succeeded(self, key: Key, after: float | None) -> None:
        """Forgets earlier failures; after: the next pass is due then, None: only when something changes."""
        self._failures.pop(key, None)
        self._unschedule(key)
        if after is not None:
            self.schedule(key, after)

    def failed(self, key: Key) -> float:
        """Schedules another try and says in how many seconds."""
        self._failures[key] = self._failures.get(key, 0) + 1
        delay = backoff(self._failures[key])
        self.schedule(key, delay)
        return delay

    def close(self) -> None:
        """No key is handed out any more."""
        self._closed = True
        for key in list(self._timers):
            self._unschedule(key)
        self._available.set()

    def _due(self, key: Key) -> None:
        del self._timers[key]
        self.add(key)

    def _unschedule(self, key: Key) -> None:
        if timer := self._timers.pop(key, None):
            timer.cancel()

    def _wait(self, turn: Turn) -> None:
        self._waiting[turn.urgency][turn.key] = turn
        self._available.set()

    def _unwait(self, key: Key) -> Turn | None:
        for waiting in self._waiting.values():
            if turn := waiting.pop(key, None):
                return turn
        return None


def _merged(earlier: Turn | None, turn: Turn) -> Turn:
    """One pass for both; how long it waited counts from the earlier."""
    if earlier is None:
        return turn
    event = turn.event if earlier.event is None else earlier.event
    return replace(earlier, event=event, urgency=min(earlier.urgency, turn.urgency))


Pass = Callable[[Turn], Awaitable[float | None]]
"""One pass over one TPModel; returns when the next one is due, None: only when something changes."""


async def work(queue: WorkQueue, run_pass: Pass) -> None:
    """One worker: passes until the queue is closed; the pass under way is finished."""
    while turn := await queue.get():
        try:
            queue.succeeded(turn.key, await run_pass(turn))
        except Exception as error:
            # One model's failure, even a mistake in this program, must not stop the others' passes.
            delay = queue.failed(turn.key)
            unexpected = not isinstance(error, ApiError)
            logger.log(
                logging.ERROR if unexpected else logging.WARNING,
                "pass failed, next try in %.1f s: %s",
                delay,
                error,
                exc_info=unexpected,
                extra={"model": str(turn.key)},
            )
        finally:
            queue.done(turn.key)
