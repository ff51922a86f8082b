"""What becomes of committed weights in files: older versions go when every rank has written the one being served."""

from __future__ import annotations

import logging

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.persisted import PersistWatch
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_ranks import Background, UpdateRanks
from tpmodel_worker.engine.weight_stages import Turns

logger = logging.getLogger(__name__)


class Pruning:
    """Looks after the files, in the background."""

    def __init__(
        self,
        world: ServedWorld,
        status: EngineStatus,
        ranks: UpdateRanks,
        background: Background,
        turns: Turns,
        persisted: PersistWatch | None,
    ) -> None:
        """persisted: None: weights are not kept in files."""
        self._world = world
        self._status = status
        self._ranks = ranks
        self._background = background
        self._turns = turns
        self._persisted = persisted

    def watch(self) -> None:
        """A version is served that ranks may be writing."""
        pool, version = self._world.pool, self._status.state.weight_version
        if self._persisted is not None and pool is not None and version:
            self._background.start(self._prune_when_written(self._persisted, pool, version))

    async def _prune_when_written(self, persisted: PersistWatch, pool: Pool, version: int) -> None:
        if not await persisted.written(pool, version):
            return
        prune = worker_pb2.WeightUpdateRequest(prune_persisted=worker_pb2.PrunePersisted(keep=version))
        async with self._turns.between_calls():
            if pool is not self._world.pool or self._world.loop is None:
                return
            try:
                await self._ranks.control(lambda _rank: prune, pool)
            except UpdateError as error:
                logger.warning("older weights were not removed: %s", error)
