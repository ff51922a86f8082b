"""The end of a weight update that went well: prepared on every rank, then committed on every rank, then served."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_life import UpdateLife
from tpmodel_worker.engine.weight_pause import Pause
from tpmodel_worker.engine.weight_ranks import Background, UpdateRanks
from tpmodel_worker.engine.weight_stages import Stage
from tpmodel_worker.engine.weight_times import TRAINER, UpdateTimes

logger = logging.getLogger(__name__)


class Commit:
    """Finishes updates. Used within a call that is due."""

    def __init__(
        self,
        status: EngineStatus,
        ranks: UpdateRanks,
        background: Background,
        life: UpdateLife,
        pause: Pause,
        times: UpdateTimes,
        committed: CommittedVersion,
    ) -> None:
        """committed: where the version is kept beside the ranks' memory."""
        self._background = background
        self._times = times
        self._status = status
        self._ranks = ranks
        self._life = life
        self._pause = pause
        self._committed = committed

    async def finish(self, version: int, running: weights_pb2.RunningRequests.ValueType) -> None:
        """Makes the version the one that is served. Raises UpdateError.

        running: what becomes of requests that run, in mode shadow.
        """
        newest = self._status.newest_version
        if version <= newest:
            raise UpdateError(grpc.StatusCode.INVALID_ARGUMENT, f"version {version} does not follow version {newest}")
        loop = self._ranks.loop
        if self._life.shadow:
            self._times.begin("pause")
            await self._pause.begin(loop, running)
        # The trainer has done its part: if it goes away from here on, that changes nothing.
        await self._background.undisturbed(self._finish(loop, version))

    async def adopt(self, version: int) -> None:
        """Serves a version that every rank has committed without a trainer. Raises UpdateError, PoolError."""
        loop = self._ranks.loop
        async with loop.between_plans():
            await self._ranks.pool.clear_kv_cache(0)
            loop.adopt_weights(version)
            self._status.set_weight_version(version)
            self._status.set_weights_condition("")
        self._pause.end(loop)
        await self._note(version)

    async def _finish(self, loop: ServingLoop, version: int) -> None:
        pool = self._ranks.pool
        async with loop.between_plans():
            await self._prepare(loop, version)
            try:
                async with self._life.or_end("the engine ends"):
                    await self._decide(version)
            except UpdateError as error:
                # In place a lost world may be found to have all of it.
                sure = self._life.shadow or pool.error is None
                what = "was not committed" if sure else "may not have been committed, GetVersion will tell"
                raise UpdateError(error.code, f"version {version} {what}: {error}") from error
            served = await self._take_up(loop, version)
        self._pause.end(loop)
        what = "served" if served else "committed, and served by the next world"
        spent = self._times.finish()
        logger.info("weights of version %d are %s; seconds: %s", version, what, spent, extra={"epoch": pool.epoch})
        await self._note(version)

    async def _prepare(self, loop: ServingLoop, version: int) -> None:
        prepare = worker_pb2.WeightUpdateRequest(prepare=worker_pb2.PrepareCommit(version=version))
        self._times.begin("digest")
        try:
            await self._ranks.control(lambda _rank: prepare)
        except UpdateError:
            # The set may not be full: what it lacks can still be sent.
            self._times.begin(TRAINER)
            if self._life.shadow:
                self._pause.end(loop)
            raise

    async def _decide(self, version: int) -> None:
        commit = worker_pb2.WeightUpdateRequest(commit=worker_pb2.CommitUpdate(version=version))
        self._life.committing = True
        self._times.begin("commit")
        await self._ranks.control(lambda _rank: commit)
        # Every rank has taken it, and every supervisor holds it: whatever dies from here on, this is the version. Up to
        # here a second set's commit is taken back, by the ranks or by those that are made again.
        self._life.decided()
        self._status.set_weight_version(version)

    async def _take_up(self, loop: ServingLoop, version: int) -> bool:
        """Gives the weights before back, and serves; False: this world cannot, the next one will."""
        confirm = worker_pb2.WeightUpdateRequest(confirm=worker_pb2.ConfirmCommit())
        try:
            self._times.begin("confirm")
            await self._ranks.control(lambda _rank: confirm)
            self._times.begin("clear")
            await self._ranks.pool.clear_kv_cache(0)
        except (UpdateError, PoolError) as error:
            self._life.lose_world(f"version {version} was committed, but could not be taken up", error)
            self._status.set_weights_condition("")
            return False
        started = time.monotonic()
        loop.adopt_weights(version, on_first=lambda: self._first_step(version, time.monotonic() - started))
        self._life.stage = Stage.JOINED
        self._status.set_weights_condition("")
        return True

    def _first_step(self, version: int, seconds: float) -> None:
        self._times.first_step(seconds)
        logger.info("the first token of version %d took %.3f s", version, seconds)

    async def _note(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._committed.note, version)
        except OSError as error:
            logger.error("version %d could not be written down, a new container would not miss it: %s", version, error)
