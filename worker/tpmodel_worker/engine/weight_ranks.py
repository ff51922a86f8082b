"""The ranks as a weight update sees them: one step on all of them, and how far their threads are."""

from __future__ import annotations

import asyncio
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
_FIRST_POLL_SECONDS = 0.005
_LAST_POLL_SECONDS = 0.1

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
            # Cancelled or not, every rank is drained before the next step.
            exchange = self._background.start(pool.control(requests, Patience(STEP_SECONDS)))
            try:
                replies = await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait({exchange})
                raise
            except PoolError as error:
                raise failure_of(error) from error
        return [reply.weight_update_ok for reply in replies]

    async def follow(
        self, pool: Pool | None, step: int, seconds: float, *, progress_counts: bool = False
    ) -> AsyncIterator[tuple[int, int]]:
        """How far the ranks' threads are: (bytes of the slowest, all bytes), until all are done. Raises UpdateError.

        pool: of the update; another one serves when its world was lost. seconds: how long it may take, or
        (progress_counts) how long nothing may come.
        """
        clock = asyncio.get_running_loop().time
        due = clock() + seconds
        seen = heard = 0
        pause = _FIRST_POLL_SECONDS
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
            if clock() >= due:
                raise UpdateError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no progress for {seconds:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    async def _states(self, expected: Pool | None) -> list[worker_pb2.WeightUpdateStatus]:
        pool = self.pool
        if pool.error is not None or pool is not expected:
            raise UpdateError(grpc.StatusCode.ABORTED, f"the world was lost: {pool.error}")
        try:
            return [status.weight_update for status in await pool.statuses()]
        except (grpc.aio.AioRpcError, WrongRankError) as error:
            raise UpdateError(grpc.StatusCode.ABORTED, f"a rank does not answer: {error}") from error
