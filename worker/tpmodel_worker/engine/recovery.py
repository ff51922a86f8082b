"""What a fault of a serving world means for the requests in it: they wait, and go on in the next world."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.budget import RebuildBudget
from tpmodel_worker.engine.build import BuiltWorld
from tpmodel_worker.engine.errors import ConfigurationError, NewerGenerationError, PodPartedError, PoolError
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.phases import RebuildTimes
from tpmodel_worker.engine.rebuild import Rebuilder, RebuildsSpentError
from tpmodel_worker.engine.replay import Replay
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.exit_codes import ExitCode

logger = logging.getLogger(__name__)

# A world that ends since that was asked for.
_NOBODYS_FAULT = (NewerGenerationError, PodPartedError)


class Faults(Protocol):
    """Who keeps the book of faults, and ends the world for good."""

    def note(self, error: PoolError, detection_seconds: float = 0.0) -> str:
        """Counts a fault; its whole description."""
        ...

    def fail(self, code: ExitCode, cause: str) -> None:
        """The world has failed for good."""
        ...


class Recovery:
    """Rebuilds lost worlds one after the other, with the requests kept meanwhile."""

    def __init__(
        self,
        rebuilder: Rebuilder,
        budget: RebuildBudget,
        *,
        patience: float,
        status: EngineStatus,
        metrics: EngineMetrics,
        clock: Callable[[], float],
        faults: Faults,
    ) -> None:
        """patience: seconds that a request without a deadline waits. clock: unix seconds."""
        self._rebuilder = rebuilder
        self._budget = budget
        self._patience = patience
        self._status = status
        self._metrics = metrics
        self._clock = clock
        self._faults = faults
        self._rebuilding: asyncio.Task[BuiltWorld | None] | None = None

    async def run(self, lost: BuiltWorld, loop: ServingLoop) -> tuple[BuiltWorld, RebuildTimes, list[Hashable]] | None:
        """The next world, the times so far, and the requests to be replayed. None: cancelled, or failed for good.

        lost: a world whose pool has failed. Afterwards `loop` still holds all requests: it has to be resumed.
        """
        error = lost.pool.error
        assert error is not None
        # Before anything is awaited: clients' health checks are to say so at once.
        self._status.set_phase(worker_pb2.PHASE_REBUILDING, cause=str(error))
        times = RebuildTimes(error.fault_kind, str(error), unix_seconds=self._clock())
        held = loop.suspend(self._patience, blame=not isinstance(error.engine, _NOBODYS_FAULT))
        keys = held.replayed
        fields = {"epoch": lost.pool.epoch}
        for request_id in held.blamed:
            self._metrics.blamed_requests.inc()
            logger.error(
                "request %s is failed: worlds are lost while they compute it", request_id,
                extra=fields | {"request_id": request_id},
            )  # fmt: skip
        logger.warning("rebuilding the world, %d requests will go on: %s", len(keys), error, extra=fields)
        built = await self._rebuild(lost, loop, times)
        return None if built is None else (built, times, keys)

    def cancel(self) -> None:
        """Ends a rebuild that is under way."""
        if self._rebuilding is not None:
            self._rebuilding.cancel()

    def replay(self, keys: Sequence[Hashable], built: BuiltWorld, times: RebuildTimes) -> Replay:
        """Follows the requests in their new world; at the end the rebuild's account is given."""

        def finish() -> None:
            self._budget.progress()
            rebuild = times.finish(epoch=built.pool.epoch, replayed_requests=len(keys), builds=self._rebuilder.builds)
            self._status.add_rebuild(rebuild)
            self._metrics.observe_rebuild(rebuild)
            spent = ", ".join(f"{phase.name} {phase.seconds:.2f}" for phase in rebuild.phases)
            fields = {"epoch": built.pool.epoch}
            logger.info("rebuilt in %.2f s, %d requests went on: %s", rebuild.seconds, len(keys), spent, extra=fields)

        times.begin("first_step")
        return Replay(keys, on_first=lambda: times.begin("replay"), on_done=finish)

    async def _rebuild(self, lost: BuiltWorld, loop: ServingLoop, times: RebuildTimes) -> BuiltWorld | None:
        self._rebuilding = rebuilding = asyncio.create_task(self._next_world(lost, times), name="rebuild")
        holding = asyncio.create_task(loop.hold(), name="requests that wait for a world")
        try:
            await asyncio.wait({rebuilding, holding}, return_when=asyncio.FIRST_COMPLETED)
            if holding.done():
                holding.result()
            return None if rebuilding.cancelled() else rebuilding.result()
        except ConfigurationError as error:
            self._faults.fail(ExitCode.CONFIGURATION, str(error))
        except RebuildsSpentError as error:
            self._faults.fail(ExitCode.RESTART_GANG, str(error))
        finally:
            self._rebuilding = None
            rebuilding.cancel()
            holding.cancel()
            await asyncio.wait({rebuilding, holding})
            await lost.pool.close()
        return None

    async def _next_world(self, lost: BuiltWorld, times: RebuildTimes) -> BuiltWorld | None:
        error = await lost.pool.failed()
        cause = self._faults.note(error, lost.pool.detection_seconds)
        times.explain(error.fault_kind, cause)
        self._status.set_phase(worker_pb2.PHASE_REBUILDING, cause=cause)
        return await self._rebuilder.run(lost, cause, times)
