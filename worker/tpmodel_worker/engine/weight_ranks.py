"""The ranks as a weight update sees them: one step on all of them, and how far their threads are."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import PoolError, WrongRankError
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.weight_errors import UpdateError, failure_of

STEP_SECONDS = 60.0
_FIRST_POLL_SECONDS = 0.003
_LAST_POLL_SECONDS = 0.1
_POLLS = 32
"""The end is noticed within this part of the time that it took: pauses that double would add up to as much again."""
_LAST_WORDS_SECONDS = 1.0
"""For bytes that are on their way when the trainer has gone."""

logger = logging.getLogger(__name__)

T = TypeVar("T")
Step = Callable[[int], worker_pb2.WeightUpdateRequest]


class Background:
    """Tasks that outlive the call that began them, up to the engine's end."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def undisturbed(self, work: Coroutine[Any, Any, T]) -> T:
        """Does it to its end, also when the caller is cancelled meanwhile: then it is told so afterwards."""
        task = self.start(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait({task})
            if not task.cancelled() and (error := task.exception()) is not None:
                logger.warning("after its call was cancelled: %s", error)
            raise

    def cancel(self) -> None:
        """Ends all of them."""
        for task in self._tasks:
            task.cancel()


class UpdateRanks:
    """The ranks of the world that serves."""

    def __init__(self, world: ServedWorld, background: Background) -> None:
        self._world = world
        self._background = background

    @property
    def pool(self) -> Pool:
        """The world's. Raises UpdateError where there is none."""
        pool = self._world.pool
        if pool is None or self._world.loop is None:
            raise UpdateError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        return pool

    @property
    def loop(self) -> ServingLoop:
        """Where requests are. Raises UpdateError where there is none."""
        loop = self._world.loop
        if loop is None:
            raise UpdateError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        return loop

    async def control(self, step: Step, pool: Pool | None = None) -> Sequence[worker_pb2.WeightUpdateOk]:
        """One step on every rank, between two plans. Raises UpdateError."""
        pool = pool or self.pool
        requests = [step(rank) for rank in range(pool.world_size)]
        async with self.loop.between_plans():
            try:
                # Cancelled or not, every rank is drained before the next step.
                replies = await self._background.undisturbed(pool.control(requests, Patience(STEP_SECONDS)))
            except PoolError as error:
                raise failure_of(error) from error
        return [reply.weight_update_ok for reply in replies]

    async def follow(
        self,
        pool: Pool | None,
        step: int,
        seconds: float,
        *,
        progress_counts: bool = False,
        ended: Callable[[], str] = lambda: "",
    ) -> AsyncIterator[tuple[int, int]]:
        """How far the ranks' threads are: (bytes of the slowest, all bytes), until all are done. Raises UpdateError.

        Args:
            pool: of the update; another one serves when its world was lost.
            step: of the ranks.
            seconds: how long it may take, or (progress_counts) how long nothing may come.
            progress_counts: see there.
            ended: why nothing will come any more; "": it may. What is on its way then still has a moment.
        """
        clock = asyncio.get_running_loop().time
        started = clock()
        due = started + seconds
        seen = heard = 0
        over = ""
        while True:
            states = await self._states(pool)
            for rank, state in enumerate(states):
                if state.step == step and state.error and state.stopped:
                    raise UpdateError(grpc.StatusCode.CANCELLED, state.stopped)
                if state.step == step and state.error:
                    raise UpdateError(grpc.StatusCode.ABORTED, f"rank {rank}: {state.error}")
            if all(state.step == step and state.done for state in states):
                return
            signs = min(state.signs if state.step == step else 0 for state in states)
            if signs > heard and progress_counts:
                due = clock() + seconds
            heard = signs
            received = min(state.received_bytes if state.step == step else 0 for state in states)
            if received > seen:
                seen = received
                yield received, states[0].total_bytes
            if not over and (over := ended()):
                due = min(due, clock() + _LAST_WORDS_SECONDS)
                seconds = _LAST_WORDS_SECONDS
            if clock() >= due:
                if over:
                    raise UpdateError(grpc.StatusCode.ABORTED, over)
                raise UpdateError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no progress for {seconds:g} s")
            await asyncio.sleep(_pause(clock() - started))

    async def _states(self, expected: Pool | None) -> list[worker_pb2.WeightUpdateStatus]:
        pool = self.pool
        if pool.error is not None or pool is not expected:
            raise UpdateError(grpc.StatusCode.ABORTED, f"the world was lost: {pool.error}")
        try:
            return [status.weight_update for status in await pool.statuses()]
        except (grpc.aio.AioRpcError, WrongRankError) as error:
            raise UpdateError(grpc.StatusCode.ABORTED, f"a rank does not answer: {error}") from error


def _pause(elapsed: float) -> float:
    return min(max(_FIRST_POLL_SECONDS, elapsed / _POLLS), _LAST_POLL_SECONDS)
