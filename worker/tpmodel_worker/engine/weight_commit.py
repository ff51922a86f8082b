"""The end of a weight update that went well: prepared on every rank, then committed on every rank, then served."""

from __future__ import annotations

import asyncio
import logging
import time

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.committed import CommittedVersion
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

    async def _finish(self, loop: ServingLoop, version: int) -> None:
        async with loop.between_plans():
            await self._prepare(loop)
            async with self._life.or_end("the engine ends"):
                await self._commit(loop, version)
        self._pause.end(loop)
        spent = self._times.finish()
        fields = {"epoch": self._ranks.pool.epoch}
        logger.info("weights of version %d are served; seconds: %s", version, spent, extra=fields)
        await self._note(version)

    async def _prepare(self, loop: ServingLoop) -> None:
        prepare = worker_pb2.WeightUpdateRequest(prepare=worker_pb2.PrepareCommit())
        self._times.begin("digest")
        try:
            await self._ranks.control(lambda _rank: prepare)
        except UpdateError:
            # The set may not be full: what it lacks can still be sent.
            self._times.begin(TRAINER)
            if self._life.shadow:
                self._pause.end(loop)
            raise

    async def _commit(self, loop: ServingLoop, version: int) -> None:
        commit = worker_pb2.WeightUpdateRequest(commit=worker_pb2.CommitUpdate(version=version))
        self._life.touched = True
        self._times.begin("commit")
        await self._ranks.control(lambda _rank: commit)
        # Up to here a second arena's commit is taken back where another rank's fails.
        self._times.begin("confirm")
        confirm = worker_pb2.WeightUpdateRequest(confirm=worker_pb2.ConfirmCommit())
        await self._ranks.control(lambda _rank: confirm)
        self._times.begin("clear")
        await self._ranks.pool.clear_kv_cache(0)
        started = time.monotonic()
        loop.adopt_weights(version, on_first=lambda: self._first_step(version, time.monotonic() - started))
        self._life.touched = self._life.complete = False
        self._life.stage = Stage.JOINED
        self._status.set_weight_version(version)
        self._status.set_weights_condition("")

    def _first_step(self, version: int, seconds: float) -> None:
        self._times.first_step(seconds)
        logger.info("the first token of version %d took %.3f s", version, seconds)

    async def _note(self, version: int) -> None:
        try:
            await asyncio.to_thread(self._committed.note, version)
        except OSError as error:
            logger.error("version %d could not be written down, a new container would not miss it: %s", version, error)
