"""From a lost world to the next: everybody out, dead processes replaced, and built again at a new epoch."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from tpmodel_worker.engine.budget import RebuildBudget
from tpmodel_worker.engine.build import BuildError, BuiltWorld, WorldBuilder
from tpmodel_worker.engine.errors import NewerGenerationError
from tpmodel_worker.engine.members import Members, Membership
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.phases import RebuildTimes
from tpmodel_worker.engine.session import RankEndpoint
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.supervisors import Supervisors

logger = logging.getLogger(__name__)

_MEET_SECONDS = 0.1
"""Between two attempts to reach ranks that are registered and do not answer."""
_LONGEST_MEET_SECONDS = 1.0
_WAITING_SECONDS = 15.0
"""Ranks that are missing for longer are worth another warning."""


class RebuildsSpentError(Exception):
    """As many rebuilds as may follow each other have been taken."""


class Rebuilder:
    """Takes a gang whose world is lost to its next one. Survivors keep process, weights and mappings."""

    def __init__(
        self,
        builder: WorldBuilder,
        members: Members,
        supervisors: Supervisors,
        budget: RebuildBudget,
        *,
        status: EngineStatus,
        metrics: EngineMetrics,
        clock: Callable[[], float],
        judge: Callable[[BuildError], bool],
    ) -> None:
        """clock: unix seconds. judge: notes a failed build; True when no other one is worth it."""
        self._builder = builder
        self._members = members
        self._supervisors = supervisors
        self._budget = budget
        self._status = status
        self._metrics = metrics
        self._clock = clock
        self._judge = judge
        self.builds = 0
        """Builds that the present rebuild has taken."""

    async def run(self, lost: BuiltWorld, cause: str, times: RebuildTimes) -> BuiltWorld | None:
        """The next world; None when the judge has given up. Raises RebuildsSpentError, ConfigurationError.

        lost: a world whose pool has failed. cause: for the error when no rebuild is left.
        """
        self.builds = 0
        await lost.pool.failed()
        await lost.pool.close()
        times.begin("respawn")
        await self.replace(lost.pool.to_replace)
        if lost.pool.error is None or not isinstance(lost.pool.error.engine, NewerGenerationError):
            await self.spend(cause)
        meet_pause = _MEET_SECONDS
        while True:
            membership = await self._whole_gang()
            self.builds += 1
            try:
                return await self._builder.build(membership, on_phase=times.begin, lost=lost)
            except BuildError as error:
                if self._judge(error):
                    return None
                times.begin("respawn")
                await self.replace(error.to_replace)
                if error.stage == "meet":
                    # Not a build yet: somebody is on the way back. Its registration, or its pod's, is waited for.
                    await self._members.changed(membership.version, meet_pause)
                    meet_pause = min(2 * meet_pause, _LONGEST_MEET_SECONDS)
                else:
                    meet_pause = _MEET_SECONDS
                    await self.spend(str(error))

    async def replace(self, endpoints: Iterable[RankEndpoint]) -> None:
        """Ends processes that are of no use any more; their supervisors start others."""
        killing = [self._replace(endpoint) for endpoint in endpoints]
        await asyncio.gather(*killing)

    async def spend(self, cause: str) -> None:
        """Takes a rebuild from the budget and waits as long as that says. Raises RebuildsSpentError."""
        pause = self._budget.spend(self._clock())
        self._status.count_rebuild(self._budget.left)
        if pause is None:
            self._metrics.rebuilds.labels("spent").inc()
            raise RebuildsSpentError(f"{self._budget.limit} rebuilds did not bring a stable world, last: {cause}")
        if pause:
            logger.warning("rebuilding in %.2f s", pause, extra={"epoch": self._status.state.epoch})
            await asyncio.sleep(pause)

    async def _replace(self, endpoint: RankEndpoint) -> None:
        fields = {"epoch": self._status.state.epoch, "rank": endpoint.rank}
        logger.warning(
            "ending rank %d (pid %d): it has not left the epoch, or its device is lost",
            endpoint.rank,
            endpoint.pid,
            extra=fields,
        )
        if await self._supervisors.kill(endpoint):
            # Else it may still be there, or be reached again as it is.
            self._members.lost(endpoint.rank, endpoint.pid)

    async def _whole_gang(self) -> Membership:
        while (membership := self._members.complete) is None:
            logger.warning("rebuilding: waiting for %s", ", ".join(self._members.missing))
            await self._members.changed(self._members.version, _WAITING_SECONDS)
        return membership
