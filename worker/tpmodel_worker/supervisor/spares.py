"""Keeps one spare ready: a process that was forked ahead and takes a dead rank's place as soon as it is told to."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from tpmodel_worker.arenas.identity import SPARE_RANK
from tpmodel_worker.supervisor.lifecycle import RestartPolicy
from tpmodel_worker.supervisor.processes import Process, ProcessStartError, ProcessTable
from tpmodel_worker.supervisor.sources import ProcessSource

_log = logging.getLogger(__name__)

SPARE = "spare"
"""Name and role of the process until it is promoted."""
_LONGEST_PAUSE_SECONDS = 60.0


class SpareLink(Protocol):
    """Where spares say that they are ready."""

    async def expect(self, rank: int, process: Process) -> None:
        """Lets a process speak there."""
        ...


class Spares:
    """Makes a spare whenever there is none and the pod's ranks all serve: their own start comes first."""

    def __init__(self, table: ProcessTable, source: ProcessSource, link: SpareLink, *, ready_seconds: float) -> None:
        """ready_seconds: how long a spare may take to be ready."""
        self._table = table
        self._source = source
        self._link = link
        self._ready_seconds = ready_seconds
        self._allowed = asyncio.Event()
        self._ready = asyncio.Event()
        self._taken = asyncio.Event()
        self._spare: Process | None = None
        self._policy = RestartPolicy(longest_pause_seconds=_LONGEST_PAUSE_SECONDS)

    def allow(self, allowed: bool) -> None:
        """Whether a new spare may be made now; an existing one stays."""
        if allowed:
            self._allowed.set()
        else:
            self._allowed.clear()

    def on_ready(self, process: Process, device_bytes: int) -> None:
        """Called by the rank socket when a spare could be promoted."""
        if process is self._spare:
            self._table.mark_ready(process, device_bytes)
            self._ready.set()

    def take(self) -> Process | None:
        """A spare that is ready, and now the caller's; None where there is none."""
        spare = self._spare
        if spare is None or not self._ready.is_set() or not spare.alive:
            return None
        self._spare = None
        self._taken.set()
        return spare

    async def keep(self) -> None:
        """Keeps a spare ready for as long as the pod lives. A spare that ends is no fault, however often."""
        while True:
            await self._allowed.wait()
            try:
                reason = await self._keep_one()
            except ProcessStartError as error:
                reason = f"a spare could not be started: {error}"
            if reason is None:
                continue
            pause = self._policy.pause(time.monotonic())
            _log.warning("%s; making another in %.1f s", reason, pause)
            await asyncio.sleep(pause)

    async def _keep_one(self) -> str | None:
        """Makes a spare and returns once it was taken (None) or why it is gone."""
        self._ready.clear()
        self._taken.clear()
        process = await self._source.new_process(SPARE, SPARE)
        self._spare = process
        try:
            await self._link.expect(SPARE_RANK, process)
            if not await _first(process, self._ready, self._ready_seconds):
                if process.alive:
                    await self._table.kill([process])
                    return f"{SPARE} (pid {process.pid}) was not ready within {self._ready_seconds:.0f} s"
            elif await _first(process, self._taken, None):
                return None
            return (await process.ended()).describe()
        finally:
            self._spare = None


async def _first(process: Process, event: asyncio.Event, seconds: float | None) -> bool:
    """Whether the event came before the process's end and within the time."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait([waiting, process.exited], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    return event.is_set()
