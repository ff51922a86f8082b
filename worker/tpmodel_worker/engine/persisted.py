"""Committed weights, in memory and in files: how a new world loads them, and what becomes of the files afterwards."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import grpc

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.checkpoint import Checkpoint
from tpmodel_worker.engine.errors import PoolError, WrongRankError
from tpmodel_worker.engine.exchange import Patience, ProgressCallback
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_choice import choose_version, own_load
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

COMMITTED = "committed"
"""File of the model's folder: the version that was committed last, whether it is in files or not."""
_FIND_SECONDS = 60.0
_LOOK_SECONDS = 0.5
_NOT_A_NAME = re.compile(r"[^A-Za-z0-9._-]+")


def persist_folder(settings: ServeSettings, checkpoint: Checkpoint) -> str:
    """The folder of this very model; "" where nothing is kept.

    Another revision, dtype or number of ranks, or other files of the checkpoint, have another one.
    """
    if not settings.persist_updates:
        return ""
    files = [f"{Path(path).name} {Path(path).stat().st_size}" for path in checkpoint.safetensors_paths]
    parts = [
        settings.model_id,
        settings.model_revision,
        settings.dtype,
        str(settings.world_size),
        str(settings.expert_parallel),
        settings.load_format,
        str(settings.dummy_seed),
        checkpoint.config_json,
        *sorted(files),
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    name = _NOT_A_NAME.sub("-", settings.model_id).strip("-.") or "model"
    return str(Path(settings.persist_updates) / f"{name}-tp{settings.world_size}-{digest}")


async def load_shards(
    pool: Pool,
    request: worker_pb2.LoadDenseShardRequest,
    patience: Patience,
    *,
    on_progress: ProgressCallback,
    known: int,
    first: bool,
) -> Sequence[worker_pb2.SessionResponse]:
    """Makes every rank load, the same version where all of them can have one. Raises PoolError.

    A version of which a rank's file turns out to be bad is refused, and the one before is tried; in the end the
    checkpoint. Whether that may be served is another question.

    Args:
        pool: joined.
        request: the same for all ranks.
        patience: for each try.
        on_progress: hears of bytes read.
        known: the version that the gang is known to have committed last.
        first: no rank has anything that another one needs.
    """
    refused: set[int] = set()
    while True:
        found = await _find(pool, request.persist_folder)
        version = choose_version(found, known=known, refused=refused)
        requests = [own_load(request, reply, version) for reply in found]
        try:
            return await pool.control(requests, patience, on_progress=on_progress)
        except PoolError as error:
            if not version or pool.error is not None or error.kinds != {worker_pb2.ERROR_KIND_BAD_PERSISTED_WEIGHTS}:
                raise
            logger.error("version %d of the weights is refused: %s", version, error, extra={"epoch": pool.epoch})
            refused.add(version)
            if first:
                await _drop(pool)


async def _drop(pool: Pool) -> None:
    """Ranks whose file was good have loaded a version that the others do not have."""
    try:
        await pool.unload()
    except PoolError as error:
        logger.info("not every rank had a shard to drop: %s", error, extra={"epoch": pool.epoch})


async def _find(pool: Pool, folder: str) -> list[worker_pb2.WeightUpdateOk]:
    find = worker_pb2.WeightUpdateRequest(find_persisted=worker_pb2.FindPersisted(folder=folder))
    replies = await pool.control([find] * pool.world_size, Patience(_FIND_SECONDS))
    return [reply.weight_update_ok for reply in replies]


class PersistWatch:
    """Looks how far the ranks are with writing what was committed."""

    def __init__(self, status: EngineStatus, metrics: EngineMetrics) -> None:
        self._status = status
        self._metrics = metrics

    async def written(self, pool: Pool, version: int) -> bool:
        """Returns when every rank has the version in its file (True), or will not have it.

        Nothing depends on it: a world that is lost meanwhile begins anew.
        """
        while pool.error is None and self._status.state.weight_version == version:
            try:
                states = [status.persist for status in await pool.statuses()]
            except (grpc.aio.AioRpcError, WrongRankError):
                return False
            if all(state.version == version for state in states):
                self._status.set_persisted(version, "")
                self._metrics.persisted_version.set(version)
                return True
            errors = [f"rank {rank}: {state.error}" for rank, state in enumerate(states) if state.error]
            if errors and not any(state.writing for state in states):
                self._status.set_persisted(None, "; ".join(errors))
                self._metrics.persist_failures.inc()
                logger.error("%s", "; ".join(errors), extra={"epoch": pool.epoch})
                return False
            await asyncio.sleep(_LOOK_SECONDS)
        return False
