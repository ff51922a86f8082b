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
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.persisted import PersistWatch
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import WEIGHTS_INCOMPLETE, WEIGHTS_LOST, EngineStatus
from tpmodel_worker.engine.trainer_link import TrainerLink
from tpmodel_worker.engine.weight_errors import UpdateError, failure_of
from tpmodel_worker.engine.weight_pause import Pause
from tpmodel_worker.engine.weight_ranks import STEP_SECONDS, Background, UpdateRanks
from tpmodel_worker.weights.ranks import update_rank

logger = logging.getLogger(__name__)

UNAVAILABLE = 14
_JOIN_SECONDS = 60.0
_DEADLINE_SECONDS = 120.0
_TURN_SECONDS = 3.0
"""How long a call waits for the one before it, which may be just about to end."""
_TRAINER_GONE = "the trainer has gone"


class Stage(enum.Enum):
    """Which calls are due."""

    IDLE = "idle"
    JOINED = "initialised"
    AWAITING = "waiting for the trainer's first index"
    STARTED = "started"


class WeightUpdates:
    """One update at a time; calls are taken one by one, in their order."""

    def __init__(
        self, world: ServedWorld, status: EngineStatus, committed: CommittedVersion, persisted: PersistWatch | None
    ) -> None:
        """committed: where the version is kept beside the ranks' memory; persisted: None: weights are not."""
        self._world = world
        self._status = status
        self._committed = committed
        self._persisted = persisted
        self._background = Background()
        self._ranks = UpdateRanks(world, self._background)
        self._pause = Pause(world, status)
        self._lock = asyncio.Lock()
        self._stage = Stage.IDLE
        self._pool: Pool | None = None
        self._shadow = False
        self._running = weights_pb2.RUNNING_REQUESTS_KEEP
        self._touched = False
        """In place: bytes may have moved since the last commit."""
        self._deadline_seconds = _DEADLINE_SECONDS
        self._steps = itertools.count(1)
        self._idle_timer: asyncio.TimerHandle | None = None
        self._trainer: TrainerLink | None = None
        self._trainer_gone = False

    @property
    def served(self) -> weights_pb2.ServedVersion:
        """The version that tokens are made with; unset where there is none."""
        condition = self._status.weights_condition
        served = weights_pb2.ServedVersion(newest_version=self._status.newest_version)
        if self._touched or condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST):
            served.reason = condition if condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST) else WEIGHTS_INCOMPLETE
            served.message = self._status.state.weights_message or "an update is under way"
        else:
            served.version = self._status.state.weight_version
        return served

    def world_serves(self, loop: ServingLoop) -> None:
        """A world begins: an update of the one before is over, and weights that are not whole are not served."""
        self._forget()
        self._touched = False
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
        self._watch_persisting()

    # -------------------------------------------------------------------------------------- calls

    async def describe(self) -> weights_pb2.GetParameterInfoResponse:
        """All tensors of the model, as the checkpoint names them. Raises UpdateError."""
        async with self._call(*Stage):
            pool = self._ranks.pool
            request = worker_pb2.WeightUpdateRequest(describe=worker_pb2.DescribeWeights())
            replies = await self._ranks.control(lambda _rank: request)
            return weights_pb2.GetParameterInfoResponse(
                served=self.served,
                parameters=replies[0].parameters,
                device=(await pool.statuses())[0].device.partition(":")[0],
                world_size=pool.world_size,
            )

    async def init(self, request: weights_pb2.InitUpdateRequest, key: str) -> None:
        """Makes the ranks join the trainer's group. Raises UpdateError; then none has.

        key: what the group's members prove to know.
        """
        async with self._call(Stage.IDLE, Stage.JOINED):
            pool = self._ranks.pool
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
            if request.backend not in ("", "nccl", "gloo"):
                raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, f"backend is {request.backend!r}: nccl or gloo")
            # Ranks that wait for a trainer that is not there would hold the group up.
            trainer = await TrainerLink.open(request.master_address, request.master_port)
            self._leave_trainer()
            self._trainer, self._trainer_gone = trainer, False
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
                        transport=request.transport,
                        backend=request.backend,
                        key=key,
                    )
                )

            async with self._or_abort("the trainer's group could not be joined"):
                await self._ranks.control(join)
                async for _ in self._ranks.follow(pool, 0, timeout + STEP_SECONDS):
                    pass
            self._stage = Stage.JOINED
            self._background.start(self._outlive(trainer))

    async def await_update(self, request: weights_pb2.AwaitUpdateRequest) -> str:
        """Transport indexed: returns when a set has begun ("") or the trainer has ended the exchange (how).

        Other calls may come meanwhile. Raises UpdateError, after which the update is over.
        """
        async with self._call(Stage.JOINED):
            step = next(self._steps)
            pool = self._ranks.pool
            awaiting = worker_pb2.AwaitIndex(tensors=request.tensors, step=step)
            await self._ranks.control(lambda _rank: worker_pb2.WeightUpdateRequest(await_index=awaiting))
            self._stage = Stage.AWAITING
        try:
            async with self._or_abort("the updater went away"):
                async for _ in self._ranks.follow(pool, step, self._deadline_seconds, progress_counts=True):
                    pass
                stopped = (await pool.statuses())[0].weight_update.stopped
        except UpdateError:
            if self._trainer_gone:
                return _TRAINER_GONE
            raise
        async with self._call(Stage.AWAITING):
            self._stage = Stage.JOINED
            if stopped:
                await self._end(stopped)
        return stopped

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
                await self._pause.begin(self._ranks.loop, self._running)
            try:
                await self._ranks.control(lambda _rank: begin)
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
            await self._ranks.control(lambda _rank: check)
            step = next(self._steps)
            receive = worker_pb2.WeightUpdateRequest(receive=worker_pb2.ReceiveWeights(update=request, step=step))
            async with self._or_abort("the trainer went away"):
                self._touched = self._touched or not self._shadow
                await self._ranks.control(lambda _rank: receive)
                yield self._response(weights_pb2.UpdateResponse.STAGE_READY, 0, 0)
                received = total = 0
                async for received, total in self._ranks.follow(
                    self._pool, step, self._deadline_seconds, progress_counts=True
                ):
                    yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVING, received, total)
            yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVED, total, total)

    async def finish(self, version: int) -> None:
        """Prepares and commits on every rank, and serves on with the new weights. Raises UpdateError."""
        async with self._call(Stage.STARTED):
            newest = self._status.newest_version
            if version <= newest:
                raise UpdateError(
                    grpc.StatusCode.INVALID_ARGUMENT, f"version {version} does not follow version {newest}"
                )
            loop = self._ranks.loop
            if self._shadow:
                await self._pause.begin(self._ranks.loop, self._running)
            async with loop.between_plans():
                prepare = worker_pb2.WeightUpdateRequest(prepare=worker_pb2.PrepareCommit())
                try:
                    await self._ranks.control(lambda _rank: prepare)
                except UpdateError:
                    # The set may not be full: what it lacks can still be sent.
                    if self._shadow:
                        self._pause.end(loop)
                    raise
                commit = worker_pb2.WeightUpdateRequest(commit=worker_pb2.CommitUpdate(version=version))
                async with self._or_abort("the commit failed"):
                    self._touched = True
                    await self._ranks.control(lambda _rank: commit)
                    await self._ranks.pool.clear_kv_cache(0)
                    loop.adopt_weights(version)
                    self._touched = False
                    self._stage = Stage.JOINED
                    self._status.set_weight_version(version)
                    self._status.set_weights_condition("")
            self._pause.end(loop)
            logger.info("weights of version %d are served", version, extra={"epoch": self._ranks.pool.epoch})
            await self._note(version)
        self._watch_persisting()

    def _watch_persisting(self) -> None:
        """Older versions go when every rank has written the one being served."""
        pool, version = self._world.pool, self._status.state.weight_version
        if self._persisted is not None and pool is not None and version:
            self._background.start(self._prune_when_written(self._persisted, pool, version))

    async def _prune_when_written(self, persisted: PersistWatch, pool: Pool, version: int) -> None:
        if not await persisted.written(pool, version):
            return
        prune = worker_pb2.WeightUpdateRequest(prune_persisted=worker_pb2.PrunePersisted(keep=version))
        async with self._lock:
            if pool is not self._world.pool or self._world.loop is None:
                return
            try:
                await self._ranks.control(lambda _rank: prune, pool)
            except UpdateError as error:
                logger.warning("older weights were not removed: %s", error)

    async def _note(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._committed.note, version)
        except OSError as error:
            logger.error("version %d could not be written down, a new container would not miss it: %s", version, error)

    async def abort(self, reason: str) -> None:
        """Ends the update. The version before is served on, unless bytes have moved in place."""
        async with self._call(*Stage):
            await self._end(reason or "the trainer aborted it")

    async def close(self) -> None:
        """The engine ends: no timer and no connection is left behind."""
        self._cancel_timers()
        self._leave_trainer()
        self._background.cancel()

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
                await self._ranks.control(lambda _rank: abort, pool)
            except UpdateError as error:
                logger.warning("not every rank has ended the update: %s", error)
        if not self._touched:
            if loop is not None:
                self._pause.end(loop)
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
            await asyncio.shield(self._background.start(self._end(cancelled)))
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

        self._background.start(end())

    async def _outlive(self, trainer: TrainerLink) -> None:
        """Ends the update when the trainer does, also between two of its calls."""
        await trainer.gone()
        async with self._lock:
            if self._trainer is trainer:
                self._trainer_gone = True
                await self._end(_TRAINER_GONE)

    def _leave_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _forget(self) -> None:
        """The world that was being updated is gone."""
        self._stage, self._pool = Stage.IDLE, None
        self._cancel_timers()
        self._leave_trainer()

    def _response(
        self, stage: weights_pb2.UpdateResponse.Stage.ValueType, received: int, total: int
    ) -> weights_pb2.UpdateResponse:
        return weights_pb2.UpdateResponse(served=self.served, stage=stage, received_bytes=received, total_bytes=total)

    # -------------------------------------------------------------------------------------- timers

    def _cancel_timers(self) -> None:
        self._stop_idling()
        self._pause.cancel()

    def _stop_idling(self) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
