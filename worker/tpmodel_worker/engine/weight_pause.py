"""Generation while the weights are exchanged: stopped between two plans, and gone on with afterwards."""

from __future__ import annotations

import asyncio

from tpmodel.v1 import weights_pb2
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import WEIGHTS_UPDATING, EngineStatus

ABORTED = 10
PLANNED_PAUSE_SECONDS = 10.0
"""A pause that lasts longer makes the gang not ready."""


class Pause:
    """Stops plans, and makes them again where there are whole weights."""

    def __init__(self, world: ServedWorld, status: EngineStatus) -> None:
        self._world = world
        self._status = status
        self._timer: asyncio.TimerHandle | None = None

    async def begin(self, loop: ServingLoop, running: weights_pb2.RunningRequests.ValueType) -> None:
        """Returns when nothing runs any more. running: what becomes of requests that do."""
        if self._status.weights_condition:
            # Nothing runs, and nothing may before a full set is there.
            loop.hold_plans()
            return
        self._timer = asyncio.get_running_loop().call_later(PLANNED_PAUSE_SECONDS, self._on_long_pause)
        try:
            if running == weights_pb2.RUNNING_REQUESTS_FINISH:
                last = loop.scheduler.close_admission()
                while loop.scheduler.has_work_before(last) and loop is self._world.loop:
                    await loop.pass_once()
            elif running == weights_pb2.RUNNING_REQUESTS_ABORT:
                loop.fail_with(ABORTED, "a weight update began: send the request again")
            loop.hold_plans()
            await loop.quiet()
        except asyncio.CancelledError:
            self.end(loop)
            raise
        loop.scheduler.open_admission()

    def end(self, loop: ServingLoop) -> None:
        """Serves on, where there are whole weights to serve."""
        self.cancel()
        loop.scheduler.open_admission()
        if self._status.weights_condition == WEIGHTS_UPDATING:
            self._status.set_weights_condition("")
        if not self._status.weights_condition:
            loop.release_plans()

    def cancel(self) -> None:
        """No condition will come of the pause any more. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_long_pause(self) -> None:
        if not self._status.weights_condition:
            self._status.set_weights_condition(WEIGHTS_UPDATING, "a weight update is under way")
