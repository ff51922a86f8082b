"""The engine's part of a live weight update: what each call of the trainer's does, and what is served meanwhile.

What waits for the trainer goes on in threads of the ranks, which are asked how far they are; only the short
steps between need all plans settled. See protos/tpmodel/v1/weights.proto for the calls.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.persisted import PersistWatch
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.trainer_link import TrainerLink
from tpmodel_worker.engine.weight_commit import Commit
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_life import TRAINER_GONE, UNAVAILABLE, UpdateLife
from tpmodel_worker.engine.weight_pause import Pause
from tpmodel_worker.engine.weight_persisting import Pruning
from tpmodel_worker.engine.weight_ranks import STEP_SECONDS, Background, UpdateRanks
from tpmodel_worker.engine.weight_stages import Stage, Turns
from tpmodel_worker.engine.weight_times import TRAINER, UpdateTimes
from tpmodel_worker.weights.ranks import JOIN_STEP, update_rank

logger = logging.getLogger(__name__)

_JOIN_SECONDS = 60.0


class WeightUpdates:
    """One update at a time; calls are taken one by one, in their order."""

    def __init__(
        self,
        world: ServedWorld,
        status: EngineStatus,
        committed: CommittedVersion,
        metrics: EngineMetrics,
        persisted: PersistWatch | None,
    ) -> None:
        """committed: where the version is kept beside the ranks' memory; persisted: None: weights are not."""
        self._status = status
        self._background = Background()
        self._ranks = UpdateRanks(world, self._background)
        self._pause = Pause(world, status)
        self._times = UpdateTimes(metrics)
        self._turns = turns = Turns()
        self._life = UpdateLife(world, status, self._ranks, self._background, self._pause, turns)
        self._commit = Commit(status, self._ranks, self._background, self._life, self._pause, self._times, committed)
        self._pruning = Pruning(world, status, self._ranks, self._background, turns, persisted)
        self._running = weights_pb2.RUNNING_REQUESTS_KEEP
        self._steps = itertools.count(1)
        self.before_start: Callable[[], Awaitable[None]] = _nothing
        """Awaited before an update takes the weights."""

    @property
    def updating(self) -> bool:
        """Whether an update has the weights, or a call is under way that may begin one."""
        return self._turns.taken or self._life.stage is Stage.STARTED

    @property
    def served(self) -> weights_pb2.ServedVersion:
        """The version that tokens are made with; unset where there is none."""
        return self._life.served

    def world_serves(self, loop: ServingLoop) -> None:
        """A world begins: an update of the one before is over, and weights that are not whole are not served."""
        self._life.forget()
        self._life.touched = False
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
        self._pruning.watch()

    # -------------------------------------------------------------------------------------- calls

    async def describe(self) -> weights_pb2.GetParameterInfoResponse:
        """All tensors of the model, as the checkpoint names them. Raises UpdateError."""
        async with self._life.call(*Stage):
            pool = self._ranks.pool
            request = worker_pb2.WeightUpdateRequest(describe=worker_pb2.DescribeWeights())
            replies = await self._ranks.control(lambda _rank: request)
            return weights_pb2.GetParameterInfoResponse(
                served=self.served,
                parameters=replies[0].parameters,
                device=(await pool.statuses())[0].device.partition(":")[0],
                world_size=pool.world_size,
            )

    async def init(self, request: weights_pb2.InitUpdateRequest, key: str) -> str:
        """Makes the ranks join the trainer's group; its session. Raises UpdateError; then none has joined.

        key: what the group's members prove to know.
        """
        async with self._life.call(Stage.IDLE, Stage.JOINED):
            pool = self._ranks.pool
            join = _join_of(request, pool.world_size)
            # Ranks that wait for a trainer that is not there would hold the group up.
            trainer = await TrainerLink.open(request.master_address, request.master_port)
            shadow = request.mode == weights_pb2.UPDATE_MODE_SHADOW
            session = self._life.begin(pool, trainer, shadow=shadow, deadline_seconds=request.deadline_seconds)
            join.deadline_seconds, join.key = self._life.deadline_seconds, key
            async with self._life.or_end("the trainer's group could not be joined"):
                await self._ranks.control(lambda rank: _join_as(join, join.group_rank + rank))
                async for _ in self._life.follow(JOIN_STEP, join.timeout_seconds + STEP_SECONDS):
                    pass
            self._life.stage = Stage.JOINED
            return session

    async def await_update(self, request: weights_pb2.AwaitUpdateRequest) -> str:
        """Transport indexed: returns when a set has begun ("") or the trainer has ended the exchange (how).

        Other calls may come meanwhile. Raises UpdateError, after which the update is over.
        """
        async with self._life.call(Stage.JOINED, session=request.session):
            step = next(self._steps)
            pool = self._ranks.pool
            awaiting = worker_pb2.AwaitIndex(tensors=request.tensors, step=step)
            await self._ranks.control(lambda _rank: worker_pb2.WeightUpdateRequest(await_index=awaiting))
            self._life.stage = Stage.AWAITING
        try:
            async with self._life.or_end("the updater went away"):
                async for _ in self._life.follow(step, self._life.deadline_seconds, progress_counts=True):
                    pass
                stopped = (await pool.statuses())[0].weight_update.stopped
        except UpdateError:
            if self._life.trainer_gone:
                return TRAINER_GONE
            raise
        async with self._life.call(Stage.AWAITING, session=request.session):
            self._life.stage = Stage.JOINED
            if stopped:
                await self._life.end(stopped)
        return stopped

    async def start(self, running: weights_pb2.RunningRequests.ValueType, session: str) -> None:
        """In place: pauses generation. Shadow: makes the second arenas, and pauses when it is finished.

        Raises UpdateError; then nothing has changed.
        """
        async with self._life.call(Stage.JOINED, session=session):
            modes = weights_pb2.RunningRequests
            if running == modes.RUNNING_REQUESTS_UNSPECIFIED:
                raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, "running is unset: finish, keep or abort")
            begin = worker_pb2.WeightUpdateRequest(begin=worker_pb2.BeginUpdate(shadow=self._life.shadow))
            self._running = running
            await self.before_start()
            self._times.start("pause")
            # Some ranks may have begun when it fails.
            async with self._life.or_end("the trainer went away"):
                if not self._life.shadow:
                    await self._pause.begin(self._ranks.loop, self._running)
                self._times.begin("begin")
                await self._ranks.control(lambda _rank: begin)
            self._times.begin(TRAINER)
            self._life.stage = Stage.STARTED

    async def update(self, request: weights_pb2.UpdateRequest) -> AsyncGenerator[weights_pb2.UpdateResponse]:
        """Receives tensors; what it yields goes to the trainer. Raises UpdateError, after which the update is over."""
        async with self._life.call(Stage.STARTED, session=request.session):
            self._times.begin("check")
            check = worker_pb2.WeightUpdateRequest(check=request)
            # A wrong name or shape costs nothing: the next call may be right.
            await self._ranks.control(lambda _rank: check)
            step = next(self._steps)
            receive = worker_pb2.WeightUpdateRequest(receive=worker_pb2.ReceiveWeights(update=request, step=step))
            async with self._life.or_end("the trainer went away"):
                self._life.touched = self._life.touched or not self._life.shadow
                self._times.begin("prepare_receiving")
                await self._ranks.control(lambda _rank: receive)
                self._times.begin("receive")
                yield self._response(weights_pb2.UpdateResponse.STAGE_READY, 0, 0)
                received = total = 0
                deadline = self._life.deadline_seconds
                async for received, total in self._life.follow(step, deadline, progress_counts=True):
                    yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVING, received, total)
            self._life.complete = request.indexed
            self._times.begin(TRAINER)
            yield self._response(weights_pb2.UpdateResponse.STAGE_RECEIVED, total, total)

    async def finish(self, version: int, session: str) -> list[weights_pb2.UpdatePhase]:
        """Prepares and commits on every rank, and serves on with the new weights; where the time went.

        Raises UpdateError.
        """
        async with self._life.call(Stage.STARTED, session=session):
            await self._commit.finish(version, self._running)
        self._pruning.watch()
        return list(self._times.phases)

    async def adopt(self, version: int) -> None:
        """Serves a version that every rank has committed otherwise. Raises UpdateError, PoolError."""
        await self._commit.adopt(version)
        self._pruning.watch()

    async def abort(self, reason: str, session: str) -> None:
        """Ends the update. The version before is served on, unless bytes have moved in place."""
        async with self._life.call(*Stage, session=session):
            await self._life.end(reason or "the trainer aborted it")

    async def close(self) -> None:
        """The engine ends: no timer and no connection is left behind."""
        self._life.close()
        self._background.cancel()

    def _response(
        self, stage: weights_pb2.UpdateResponse.Stage.ValueType, received: int, total: int
    ) -> weights_pb2.UpdateResponse:
        return weights_pb2.UpdateResponse(served=self.served, stage=stage, received_bytes=received, total_bytes=total)


def _join_of(request: weights_pb2.InitUpdateRequest, ranks: int) -> worker_pb2.JoinUpdate:
    """What rank 0 of the gang is told. Raises UpdateError where the request can't be."""
    first = update_rank(gang_index=request.gang_index, world_size=ranks, rank=0, offset=request.rank_offset)
    if request.rank_offset < 1 or request.world_size < first + ranks:
        raise UpdateError(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"world_size {request.world_size} with rank_offset {request.rank_offset}: the trainer is rank 0, "
            f"gang {request.gang_index} needs ranks {first} to {first + ranks - 1}",
        )
    if request.mode not in (weights_pb2.UPDATE_MODE_IN_PLACE, weights_pb2.UPDATE_MODE_SHADOW):
        raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, "mode is unset: in_place or shadow")
    if request.backend not in ("", "nccl", "gloo"):
        raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, f"backend is {request.backend!r}: nccl or gloo")
    return worker_pb2.JoinUpdate(
        master_address=request.master_address,
        master_port=request.master_port,
        group_rank=first,
        group_size=request.world_size,
        timeout_seconds=request.timeout_seconds or _JOIN_SECONDS,
        transport=request.transport,
        backend=request.backend,
        rehearsal=request.rehearsal if request.HasField("rehearsal") else None,
    )


def _join_as(join: worker_pb2.JoinUpdate, group_rank: int) -> worker_pb2.WeightUpdateRequest:
    request = worker_pb2.WeightUpdateRequest(join=join)
    request.join.group_rank = group_rank
    return request


async def _nothing() -> None:
    """Nobody else uses the weights."""
