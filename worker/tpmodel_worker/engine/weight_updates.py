"""The engine's part of a live weight update: the order of the steps, and what is served meanwhile.

What waits for the trainer goes on in threads of the ranks, which are asked how far they are; only the short
steps between need all plans settled. See protos/tpmodel/v1/weights.proto for the calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.errors import PoolError, WrongRankError
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import WEIGHTS_INCOMPLETE, WEIGHTS_LOST, WEIGHTS_UPDATING, EngineStatus
from tpmodel_worker.engine.trainer_link import TrainerLink
from tpmodel_worker.engine.weight_errors import UpdateError, failure_of
from tpmodel_worker.weights.ranks import update_rank

logger = logging.getLogger(__name__)

ABORTED = 10
UNAVAILABLE = 14
PLANNED_PAUSE_SECONDS = 10.0
"""A pause that lasts longer makes the gang not ready."""
_JOIN_SECONDS = 60.0
_DEADLINE_SECONDS = 120.0
_STEP_SECONDS = 60.0
_TURN_SECONDS = 3.0
"""How long a call waits for the one before it, which may be just about to end."""
_FIRST_POLL_SECONDS = 0.005
_LAST_POLL_SECONDS = 0.1


class Stage(enum.Enum):
    """Which calls are due."""

    IDLE = "idle"
    JOINED = "initialised"
    STARTED = "started"


T = TypeVar("T")
_Step = Callable[[int], worker_pb2.WeightUpdateRequest]


class WeightUpdates:
    """One update at a time; calls are taken one by one, in their order."""

    def __init__(self, world: ServedWorld, status: EngineStatus) -> None:
        self._world = world
        self._status = status
        self._lock = asyncio.Lock()
        self._stage = Stage.IDLE
        self._pool: Pool | None = None
        self._shadow = False
        self._running = weights_pb2.RUNNING_REQUESTS_KEEP
        self._touched = False
        """In place: bytes may have moved since the last commit."""
        self._newest = 0
        self._deadline_seconds = _DEADLINE_SECONDS
        self._steps = itertools.count(1)
        self._pause_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._trainer: TrainerLink | None = None
        self._background: set[asyncio.Task[Any]] = set()

    @property
    def served(self) -> weights_pb2.ServedVersion:
        """The version that tokens are made with; unset where there is none."""
        condition = self._status.weights_condition
        if self._touched or condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST):
            reason = condition if condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST) else WEIGHTS_INCOMPLETE
            return weights_pb2.ServedVersion(
                reason=reason, message=self._status.state.weights_message or "an update is under way"
            )
        return weights_pb2.ServedVersion(version=self._status.state.weight_version)

    def world_serves(self, loop: ServingLoop) -> None:
        """A world begins: an update of the one before is over, and weights that are not whole are not served."""
        self._forget()
        self._touched = False
        self._newest = max(self._newest, self._status.state.weight_version)
        if self._status.weights_condition:
            logger.error("%s: %s", self._status.weights_condition, self._status.state.weights_message)
            loop.hold_plans()
            loop.fail_with(UNAVAILABLE, self._status.state.weights_message)
            return
        if loop.scheduler.weight_version != self._status.state.weight_version:
            # The world was lost between the commit on its ranks and the news of it.
            loop.adopt_weights(self._status.state.weight_version)
        loop.scheduler.open_admission()
        loop.release_plans()

    # -------------------------------------------------------------------------------------- calls

    async def describe(self) -> weights_pb2.GetParameterInfoResponse:
        """All tensors of the model, as the checkpoint names them. Raises UpdateError."""
        async with self._call(Stage.IDLE, Stage.JOINED, Stage.STARTED):
            pool = self._ranks()
            request = worker_pb2.WeightUpdateRequest(describe=worker_pb2.DescribeWeights())
            replies = await self._control(lambda _rank: request)
            return weights_pb2.GetParameterInfoResponse(
                served=self.served,
                parameters=replies[0].parameters,
                device=(await pool.statuses())[0].device.partition(":")[0],
                world_size=pool.world_size,
            )

    async def init(self, request: weights_pb2.InitUpdateRequest) -> None:
        """Makes the ranks join the trainer's group. Raises UpdateError; then none has."""
        async with self._call(Stage.IDLE, Stage.JOINED):
            pool = self._ranks()
            first = update_rank(
                gang_index=request.gang_index, world_size=pool.world_size, rank=0, offset=request.rank_offset
            )
            if request.rank_offset < 1 or request.world_size < first + pool.world_size:
                raise UpdateError(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    f"world_size {request.world_size} with rank_offset {request.rank_offset}: the trainer is rank 0, "
                    f"gang {request.gang_index} needs ranks {first} to {first + pool.world_size - 1}",
                )
            if request.mode not in (weights_pb2.UPDATE_MODE_IN_PLACE, weights_pb2.UPDATE_MODE_SHADOW):
                raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, "mode is unset: in_place or shadow")
            # Ranks that wait for a trainer that is not there would hold the group up.
            trainer = await TrainerLink.open(request.master_address, request.master_port)
            self._leave_trainer()
            self._trainer = trainer
            self._pool, self._stage = pool, Stage.IDLE
            self._shadow = request.mode == weights_pb2.UPDATE_MODE_SHADOW
            self._deadline_seconds = request.deadline_seconds or _DEADLINE_SECONDS
            timeout = request.timeout_seconds or _JOIN_SECONDS

            def join(rank: int) -> worker_pb2.WeightUpdateRequest:
                return worker_pb2.WeightUpdateRequest(
                    join=worker_pb2.JoinUpdate(
                        master_address=request.master_address,
                        master_port=request.master_port,
                        group_rank=first + rank,
                        group_size=request.world_size,
                        timeout_seconds=timeout,
                        deadline_seconds=self._deadline_seconds,
                    )
                )

            async with self._or_abort("the trainer's group could not be joined"):
                await self._control(join)
                async for _ in self._follow(0, timeout + _STEP_SECONDS):
                    pass
            self._stage = Stage.JOINED
            self._in_background(self._outlive(trainer))

    async def start(self, running: weights_pb2.RunningRequests.ValueType) -> None:
        """In place: pauses generation. Shadow: makes the second arenas, and pauses when it is finished.

        Raises UpdateError; then nothing has changed.
        """
        async with self._call(Stage.JOINED):
            modes = weights_pb2.RunningRequests
            if running == modes.RUNNING_REQUESTS_UNSPECIFIED:
                raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, "running is unset: finish, keep or abort")
            begin = worker_pb2.WeightUpdateRequest(begin=worker_pb2.BeginUpdate(shadow=self._shadow))
            self._running = running
            if not self._shadow:
                await self._pause()
            try:
                await self._control(lambda _rank: begin)
            except UpdateError as error:
                # Some ranks may have begun.
                await self._end(str(error))
                raise
            self._stage = Stage.STARTED

    async def update(self, request: weights_pb2.UpdateRequest) -> AsyncGenerator[weights_pb2.UpdateResponse]:
        """Receives tensors; what it yields goes to the trainer. Raises UpdateError, after which the update is over."""
        async with self._call(Stage.STARTED):
            check = worker_pb2.WeightUpdateRequest(check=request)
            # A wrong name or shape costs nothing: the next call may be right.
            await self._control(lambda _rank: check)
            step = next(self._steps)
            receive = worker_pb2.WeightUpdateRequest(receive=worker_pb2.ReceiveWeights(update=request, step=step))
            async with self._or_abort("the trainer went away"):
                self._touched = self._touched or not self._shadow
                await self._control(lambda _rank: receive)
                yield self._response(weights_pb2.UpdateResponse.STAGE_READY, 0, 0)
                received = total = 0
                async for received, total in self._follow(step, self._deadline_seconds, progress_counts=True):
                    yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVING, received, total)
            yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVED, total, total)

    async def finish(self, version: int) -> None:
        """Prepares and commits on every rank, and serves on with the new weights. Raises UpdateError."""
        async with self._call(Stage.STARTED):
            newest = max(self._newest, self._status.state.weight_version)
            if version <= newest:
                raise UpdateError(
                    grpc.StatusCode.INVALID_ARGUMENT, f"version {version} does not follow version {newest}"
                )
            loop = self._serving()
            if self._shadow:
                await self._pause()
            async with self._held_plans(loop):
                prepare = worker_pb2.WeightUpdateRequest(prepare=worker_pb2.PrepareCommit())
                try:
                    await self._control(lambda _rank: prepare)
                except UpdateError:
                    # The set may not be full: what it lacks can still be sent.
                    if self._shadow:
                        self._resume(loop)
                    raise
                commit = worker_pb2.WeightUpdateRequest(commit=worker_pb2.CommitUpdate(version=version))
                async with self._or_abort("the commit failed"):
                    self._touched = True
                    await self._control(lambda _rank: commit)
                    await self._ranks().clear_kv_cache(0)
                    loop.adopt_weights(version)
                    self._touched = False
                    self._newest = version
                    self._stage = Stage.JOINED
                    self._status.set_weight_version(version)
                    self._status.set_weights_condition("")
            self._resume(loop)
            logger.info("weights of version %d are served", version, extra={"epoch": self._ranks().epoch})

    async def abort(self, reason: str) -> None:
        """Ends the update. The version before is served on, unless bytes have moved in place."""
        async with self._call(Stage.IDLE, Stage.JOINED, Stage.STARTED):
            await self._end(reason or "the trainer aborted it")

    async def close(self) -> None:
        """The engine ends: no timer and no connection is left behind."""
        self._cancel_timers()
        self._leave_trainer()
        for task in self._background:
            task.cancel()

    # ------------------------------------------------------------------------------------- the end

    async def _end(self, reason: str) -> None:
        """Every rank leaves the group; the gang serves what it can."""
        was, self._stage = self._stage, Stage.IDLE
        self._cancel_timers()
        self._leave_trainer()
        pool, loop = self._pool, self._world.loop
        self._pool = None
        if was is Stage.STARTED:
            logger.warning("the weight update was ended: %s", reason)
        if pool is not None and pool is self._world.pool and pool.error is None:
            abort = worker_pb2.WeightUpdateRequest(abort=worker_pb2.AbortWeightUpdate(reason=reason))
            try:
                await self._control(lambda _rank: abort, pool)
            except UpdateError as error:
                logger.warning("not every rank has ended the update: %s", error)
        if not self._touched:
            if loop is not None:
                self._resume(loop)
            return
        message = f"an update did not finish: {reason}; send a full set"
        self._status.set_weights_condition(WEIGHTS_INCOMPLETE, message)
        if loop is not None:
            loop.fail_with(UNAVAILABLE, f"{WEIGHTS_INCOMPLETE}: {message}")

    @contextlib.asynccontextmanager
    async def _or_abort(self, cancelled: str) -> AsyncIterator[None]:
        """Whatever goes wrong inside ends the update."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            await asyncio.shield(self._in_background(self._end(cancelled)))
            raise
        except (UpdateError, PoolError) as error:
            await self._end(str(error))
            if isinstance(error, PoolError):
                raise failure_of(error) from error
            raise

    @contextlib.asynccontextmanager
    async def _call(self, *stages: Stage) -> AsyncIterator[None]:
        """One call at a time, and only where it is due."""
        try:
            async with asyncio.timeout(_TURN_SECONDS):
                await self._lock.acquire()
        except TimeoutError as error:
            message = "another call of this update is under way"
            raise UpdateError(grpc.StatusCode.FAILED_PRECONDITION, message) from error
        try:
            if self._pool is not None and self._pool is not self._world.pool:
                self._forget()
            if self._stage not in stages:
                due = " or ".join(stage.value for stage in stages)
                message = f"the update is {self._stage.value}: this call is due when it is {due}"
                raise UpdateError(grpc.StatusCode.FAILED_PRECONDITION, message)
            self._stop_idling()
            yield
        finally:
            if self._stage is Stage.STARTED and self._idle_timer is None:
                # A trainer that says nothing more must not keep the gang paused.
                self._idle_timer = asyncio.get_running_loop().call_later(self._deadline_seconds, self._on_silence)
            self._lock.release()

    def _on_silence(self) -> None:
        async def end() -> None:
            async with self._lock:
                if self._stage is Stage.STARTED:
                    await self._end(f"the trainer said nothing for {self._deadline_seconds:g} s")

        self._in_background(end())

    async def _outlive(self, trainer: TrainerLink) -> None:
        """Ends the update when the trainer does, also between two of its calls."""
        await trainer.gone()
        async with self._lock:
            if self._trainer is trainer:
                await self._end("the trainer has gone")

    def _leave_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _forget(self) -> None:
        """The world that was being updated is gone."""
        self._stage, self._pool = Stage.IDLE, None
        self._cancel_timers()
        self._leave_trainer()

    # --------------------------------------------------------------------------------------- pause

    async def _pause(self) -> None:
        running = self._running
        loop = self._serving()
        if self._status.weights_condition:
            # Nothing runs, and nothing may before a full set is there.
            loop.hold_plans()
            return
        self._pause_timer = asyncio.get_running_loop().call_later(PLANNED_PAUSE_SECONDS, self._on_long_pause)
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
            self._resume(loop)
            raise
        loop.scheduler.open_admission()

    def _resume(self, loop: ServingLoop) -> None:
        """Serves on, where there are whole weights to serve."""
        self._stop_pause_timer()
        loop.scheduler.open_admission()
        if self._status.weights_condition == WEIGHTS_UPDATING:
            self._status.set_weights_condition("")
        if not self._status.weights_condition:
            loop.release_plans()

    def _on_long_pause(self) -> None:
        if not self._status.weights_condition:
            self._status.set_weights_condition(WEIGHTS_UPDATING, "a weight update is under way")

    @contextlib.asynccontextmanager
    async def _held_plans(self, loop: ServingLoop) -> AsyncIterator[None]:
        """No plans are made inside; afterwards as before."""
        before = loop.held
        loop.hold_plans()
        try:
            await loop.quiet()
            yield
        finally:
            if not before:
                loop.release_plans()

    # --------------------------------------------------------------------------------------- ranks

    async def _control(self, step: _Step, pool: Pool | None = None) -> Sequence[worker_pb2.WeightUpdateOk]:
        """One step on every rank, between two plans. Raises UpdateError."""
        pool = pool or self._ranks()
        requests = [step(rank) for rank in range(pool.world_size)]
        async with self._held_plans(self._serving()):
            # Cancelled or not, every rank is drained before the next step.
            exchange = self._in_background(pool.control(requests, Patience(_STEP_SECONDS)))
            try:
                replies = await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait({exchange})
                raise
            except PoolError as error:
                raise failure_of(error) from error
        return [reply.weight_update_ok for reply in replies]

    async def _follow(
        self, step: int, seconds: float, *, progress_counts: bool = False
    ) -> AsyncIterator[tuple[int, int]]:
        """How far the ranks' threads are: (bytes of the slowest, all bytes), until all are done. Raises UpdateError."""
        clock = asyncio.get_running_loop().time
        due = clock() + seconds
        seen = 0
        pause = _FIRST_POLL_SECONDS
        while True:
            states = await self._states()
            for rank, state in enumerate(states):
                if state.step == step and state.error:
                    raise UpdateError(grpc.StatusCode.ABORTED, f"rank {rank}: {state.error}")
            if all(state.step == step and state.done for state in states):
                return
            received = min(state.received_bytes if state.step == step else 0 for state in states)
            if received > seen:
                seen = received
                if progress_counts:
                    due = clock() + seconds
                yield received, states[0].total_bytes
            if clock() >= due:
                raise UpdateError(grpc.StatusCode.DEADLINE_EXCEEDED, f"no progress for {seconds:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)

    async def _states(self) -> list[worker_pb2.WeightUpdateStatus]:
        pool = self._ranks()
        if pool.error is not None or pool is not self._pool:
            raise UpdateError(grpc.StatusCode.ABORTED, f"the world was lost: {pool.error}")
        try:
            return [status.weight_update for status in await pool.statuses()]
        except (grpc.aio.AioRpcError, WrongRankError) as error:
            raise UpdateError(grpc.StatusCode.ABORTED, f"a rank does not answer: {error}") from error

    def _ranks(self) -> Pool:
        pool = self._world.pool
        if pool is None or self._world.loop is None:
            raise UpdateError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        return pool

    def _serving(self) -> ServingLoop:
        loop = self._world.loop
        if loop is None:
            raise UpdateError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        return loop

    def _response(
        self, stage: weights_pb2.UpdateResponse.Stage.ValueType, received: int, total: int
    ) -> weights_pb2.UpdateResponse:
        return weights_pb2.UpdateResponse(served=self.served, stage=stage, received_bytes=received, total_bytes=total)

    # -------------------------------------------------------------------------------------- timers

    def _cancel_timers(self) -> None:
        self._stop_idling()
        self._stop_pause_timer()

    def _stop_idling(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _stop_pause_timer(self) -> None:
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None

    def _in_background(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task
