"""Mode InPlace: a pod that drains leaves the gang, and the world waits for its successor with all else kept.

The gang is not ready from the beginning. Requests that run are finished by the old world, as far as there is time; what
is left of them, and what comes meanwhile, is for the next one.
"""

from __future__ import annotations

import asyncio
import logging
import time

from tpmodel_worker.engine.errors import PodPartedError
from tpmodel_worker.engine.members import Members
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import EngineStatus

logger = logging.getLogger(__name__)


class Partings:
    """Lets pods go, one task for each."""

    def __init__(
        self, world: ServedWorld, members: Members, status: EngineStatus, *, timeout: float, propagation: float
    ) -> None:
        """timeout: seconds that running requests have, of which `propagation` pass until clients know."""
        self._world = world
        self._members = members
        self._status = status
        self._timeout = timeout
        self._propagation = min(propagation, timeout)
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def begin(self, uid: str, name: str) -> None:
        """A pod of the gang got SIGTERM. Idempotent."""
        if uid not in self._tasks or self._tasks[uid].done():
            self._status.set_parting(name, uid)
            self._tasks[uid] = asyncio.create_task(self._part(uid, name), name=f"parting of pod {name}")

    def world_serves(self) -> None:
        """A world begins: all of its pods are there to stay, unless one has begun to drain meanwhile."""
        if all(task.done() for task in self._tasks.values()):
            self._status.set_parting("")

    def cancel(self) -> None:
        """The whole gang drains, or the engine ends: nobody waits for a successor."""
        for task in self._tasks.values():
            task.cancel()

    async def _part(self, uid: str, name: str) -> None:
        end = time.monotonic() + self._timeout
        pool, loop = self._world.pool, self._world.loop
        if pool is not None and loop is not None:
            await asyncio.sleep(self._propagation)
            last = loop.scheduler.close_admission()
            try:
                async with asyncio.timeout(max(end - time.monotonic(), 0.0)):
                    while self._world.pool is pool and loop.scheduler.has_work_before(last):
                        await loop.pass_once()
            except TimeoutError:
                logger.warning("pod %s has no more time: what still runs goes on in the next world", name)
            finally:
                loop.scheduler.open_admission()
        logger.info("pod %s is let go: the world waits for its successor", name, extra={"pod": uid})
        self._members.part(uid)
        if self._world.pool is not None:
            self._world.pool.fault("a pod was drained", PodPartedError(f"pod {name}"))
        self._status.add_parted(uid)
