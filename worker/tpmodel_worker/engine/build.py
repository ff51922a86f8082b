"""One attempt at a world: sessions to all ranks, joined, checked, loaded and with an empty KV cache."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import grpc

from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.attempts import attempt_of, epoch_floor
from tpmodel_worker.engine.checkpoint import Checkpoint, read_checkpoint
from tpmodel_worker.engine.committed import CommittedVersion
from tpmodel_worker.engine.errors import (
    ConfigurationError,
    PoolError,
    RankFailure,
    RendezvousMovedError,
    StaleAttemptError,
    WrongRankError,
)
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.members import Membership
from tpmodel_worker.engine.persisted import COMMITTED, load_shards, persist_folder
from tpmodel_worker.engine.plans import PlanTimes
from tpmodel_worker.engine.pool import Pool, PoolTimeouts
from tpmodel_worker.engine.session import RankChannel, RankEndpoint
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_peers import WeightPeers, weight_set
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

_STATUS_SECONDS = 5.0
_JOIN_GRACE_SECONDS = 5.0
"""What the engine waits beyond the time that ranks have to join: they say best themselves what failed."""

Stage = Literal["meet", "join", "load"]
"""Where a build failed: before an epoch was begun, before the ranks were one world, or after."""


PhaseListener = Callable[[str], None]


def _ignore(_phase: str) -> None:
    """Nobody wants to know."""


class BuildError(Exception):
    """No world came of this attempt; everything it had opened is closed."""

    def __init__(self, stage: Stage, error: PoolError, *, to_replace: Sequence[RankEndpoint] = ()) -> None:
        """to_replace: ranks whose processes are of no use any more."""
        super().__init__(str(error))
        self.stage: Stage = stage
        self.error = error
        self.to_replace = to_replace


@dataclass(frozen=True, slots=True)
class GangCache:
    """The whole gang's KV cache, and where it is."""

    layout: kv_pb2.KvLayout
    device_ids: Sequence[str]
    """By rank: its GPU, "" on CPU."""


@dataclass(frozen=True, slots=True)
class BuiltWorld:
    """A world whose every rank has confirmed every step of the build."""

    pool: Pool
    num_blocks: int
    state_bytes: int
    """Bytes of recurrent state on every rank; above 0 sequences cannot go on from blocks alone."""
    state_snapshots: int
    """Snapshots of it that every rank can hold."""
    kv: GangCache
    """What other gangs are told of the cache."""


class WorldBuilder:
    """Builds worlds, each at a new epoch."""

    def __init__(
        self,
        settings: ServeSettings,
        *,
        status: EngineStatus,
        wake: Callable[[], None],
        committed: CommittedVersion,
        peers: WeightPeers,
        timeouts: PoolTimeouts | None = None,
    ) -> None:
        """wake: given to every pool; peers: may have newer weights than a gang that starts."""
        self._settings = settings
        self._status = status
        self._committed = committed
        self._peers = peers
        self._wake = wake
        self._timeouts = timeouts
        self._times = PlanTimes(settings.least_step_deadline)
        self._last_epoch = epoch_floor(settings.attempt)
        self._checkpoint: Checkpoint | None = None
        self.pool: Pool | None = None
        """The newest one: of the world that is built, or being built."""
        self._meets_at = ""
        """The rendezvous of the ranks that are joining."""

    async def build(
        self, membership: Membership, *, on_phase: PhaseListener = _ignore, lost: BuiltWorld | None = None
    ) -> BuiltWorld:
        """Takes every rank through the build. Raises BuildError or ConfigurationError, with nothing left open.

        Args:
            membership: all ranks.
            on_phase: told what begins: init, check, map, clear.
            lost: the world before this one; ranks that are still there then keep the memory of their cache, which is
                no larger than it was, and their weights also when others fail to load. None: it is the first one.
        """
        settings = self._settings
        if self._checkpoint is None:
            # Once: ranks that have their weights need no file, and neither does a rebuild.
            folder = Path(settings.model_path)
            self._checkpoint = await asyncio.to_thread(read_checkpoint, folder, settings.load_format)
        channels = [RankChannel(endpoint, settings.token) for endpoint in membership.ranks]
        pool: Pool | None = None
        built = False
        try:
            self._last_epoch = await self._next_epoch(channels)
            self._status.set_world(epoch=self._last_epoch)
            self._status.set_rank_states("connected")
            pool = Pool(
                channels,
                epoch=self._last_epoch,
                instance_id=self._status.state.instance_id,
                times=self._times,
                wake=self._wake,
                timeouts=self._timeouts,
            )
            self.pool = pool
            on_phase("init")
            await self._join(pool, membership, on_phase)
            on_phase("map")
            world = await self._load(pool, self._checkpoint, on_phase, lost)
            built = True
            return world
        except BuildError as error:
            if pool is not None:
                await pool.abort("the world could not be built")
                error.to_replace = pool.to_replace
            raise
        finally:
            if not built:
                if pool is not None:
                    await pool.abort("the world could not be built")
                    await pool.close()
                else:
                    await asyncio.gather(*(channel.close() for channel in channels))

    def rendezvous_is(self, rendezvous: str) -> None:
        """Where ranks meet from now on: those that are joining at another store, which is gone, wait in vain."""
        if self._meets_at and rendezvous and rendezvous != self._meets_at and self.pool is not None:
            moved = RendezvousMovedError(f"the ranks meet at {self._meets_at}, but the store is {rendezvous} now")
            self.pool.fault("the rendezvous has moved", moved)

    async def _next_epoch(self, channels: Sequence[RankChannel]) -> int:
        """An epoch above every one that a rank or this engine has seen."""
        answers = await asyncio.gather(*(_get_status(channel) for channel in channels))
        failures = [answer for answer in answers if isinstance(answer, RankFailure)]
        if failures:
            silent = {failure.rank for failure in failures if failure.kind == worker_pb2.ERROR_KIND_DEADLINE}
            hung = [channel.endpoint for channel in channels if channel.endpoint.rank in silent]
            raise BuildError("meet", PoolError("get_status failed", ranks=failures), to_replace=hung)
        highest = self._last_epoch
        for answer in answers:
            if isinstance(answer, worker_pb2.GetStatusResponse):
                highest = max(highest, answer.epoch)
                self._status.set_device(answer.rank, answer.device)
        if (seen := attempt_of(highest)) != self._settings.attempt:
            message = f"a rank has seen attempt {seen}, this engine is of attempt {self._settings.attempt}"
            raise BuildError("meet", PoolError("the engine is outdated", engine=StaleAttemptError(message)))
        return highest + 1

    async def _join(self, pool: Pool, membership: Membership, on_phase: PhaseListener) -> None:
        settings = self._settings
        requests = [
            worker_pb2.InitRequest(
                rank=endpoint.rank,
                world_size=pool.world_size,
                rendezvous=membership.rendezvous,
                rendezvous_id=f"epoch-{pool.epoch}",
                timeout_seconds=settings.init_timeout,
                pods=[other.pod for other in membership.ranks],
                instance_id=self._status.state.instance_id,
                communicator=settings.communicator,
            )
            for endpoint in membership.ranks
        ]
        patience = Patience(settings.init_timeout + _JOIN_GRACE_SECONDS)
        self._meets_at = membership.rendezvous
        try:
            replies = await pool.control(requests, patience, collective=True)
            on_phase("check")
            await pool.sanity_check(patience)
        except PoolError as error:
            raise BuildError("join", error) from error
        finally:
            self._meets_at = ""
        names = [reply.init_ok.communicator for reply in replies]
        self._status.set_rank_states("initialised", names)
        seconds = max(reply.init_ok.seconds for reply in replies)
        logger.info("%d ranks joined by %s in %.2f s", pool.world_size, names[0], seconds, extra={"epoch": pool.epoch})

    async def _load(
        self, pool: Pool, checkpoint: Checkpoint, on_phase: PhaseListener, lost: BuiltWorld | None
    ) -> BuiltWorld:
        """Loads the shards and empties the caches.

        lost: the world before this one, if there was one.
        """
        if lost is None:
            self._status.set_phase(worker_pb2.PHASE_LOADING)
        self._status.set_rank_states("loading")
        request = self._load_request(checkpoint)
        patience = Patience(self._settings.progress_deadline, progress_counts=True)
        progress = LoadProgress(self._status, pool.world_size)
        try:
            if request.persist_folder:
                self._committed.share(Path(request.persist_folder) / COMMITTED)
            known = max(self._status.state.weight_version, await asyncio.to_thread(self._committed.read))
            first = lost is None
            replies = await load_shards(pool, request, patience, on_progress=progress, known=known, first=first)
        except PoolError as error:
            if pool.error is None and lost is None:
                await _drop_shards(pool)
            raise BuildError("load", error) from error
        loaded = [reply.load_dense_shard_ok for reply in replies]
        for rank, shard in enumerate(loaded):
            logger.info(
                "rank %d %s %d bytes in %.2f s (%d read), digest %016x, KV cache of up to %d blocks",
                rank,
                "mapped" if shard.mapped else "loaded",
                shard.bytes,
                shard.seconds,
                shard.bytes_read,
                shard.digest,
                shard.kv_blocks_available,
                extra={"epoch": pool.epoch, "rank": rank},
            )
        self._status.set_loaded_versions(
            [shard.weight_version if shard.HasField("weight_version") else None for shard in loaded],
            await self._known_version(loaded),
        )
        num_blocks = min(shard.kv_blocks_available for shard in loaded)
        state_snapshots = min(shard.state_snapshots_available for shard in loaded)
        if lost is not None:
            num_blocks = min(num_blocks, lost.num_blocks)
            state_snapshots = min(state_snapshots, lost.state_snapshots)
        self._check_capacity(num_blocks, loaded[0].kv_block_bytes)
        state_bytes = loaded[0].state_bytes
        if state_bytes and lost is None:
            self._report_state(state_bytes, state_snapshots, loaded[0].state_snapshot_bytes)
        on_phase("clear")
        try:
            await pool.clear_kv_cache(num_blocks, state_snapshots=state_snapshots)
        except PoolError as error:
            raise BuildError("load", error) from error
        self._status.set_rank_states("ready")
        self._status.set_world(block_size=self._settings.block_size, kv_blocks=num_blocks)
        kv = GangCache(loaded[0].kv_layout, [shard.device_id for shard in loaded])
        return BuiltWorld(pool, num_blocks, state_bytes, state_snapshots, kv)

    async def _known_version(self, loaded: Sequence[worker_pb2.LoadDenseShardOk]) -> int:
        """The newest version of the weights that this gang has had, or, where it had none in memory, others have."""
        if any(shard.mapped for shard in loaded):
            return await asyncio.to_thread(self._committed.read)
        known = await asyncio.to_thread(self._committed.read, shared=True)
        if not self._peers:
            return known
        return max(known, await self._peers.newest(weight_set(self._settings, loaded[0].kv_layout)))

    def _report_state(self, state_bytes: int, snapshots: int, snapshot_bytes: int) -> None:
        settings = self._settings
        if not settings.prefix_cache:
            cache = ""
        elif snapshots:
            cache = f"; {snapshots} snapshots of it for the prefix cache take {snapshot_bytes} bytes each"
        elif settings.state_snapshots == 0:
            cache = "; the prefix cache is off: blocks do not hold that state, and state_snapshots is 0"
        else:
            cache = "; the prefix cache is off: there is no room for snapshots of that state beside the blocks"
        logger.info(
            "recurrent state of %d sequences takes %d bytes of each rank, beside the KV blocks%s",
            settings.max_num_seqs,
            state_bytes,
            cache,
        )

    def _load_request(self, checkpoint: Checkpoint) -> worker_pb2.LoadDenseShardRequest:
        settings = self._settings
        return worker_pb2.LoadDenseShardRequest(
            model_id=settings.model_id,
            config_json=checkpoint.config_json,
            safetensors_paths=checkpoint.safetensors_paths,
            load_format=settings.load_format,
            dtype=settings.dtype,
            dummy_seed=settings.dummy_seed,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            block_size=settings.block_size,
            kv_cache_bytes=settings.kv_cache_bytes,
            state_snapshots=settings.state_snapshots if settings.prefix_cache else 0,
            persist_folder=persist_folder(settings, checkpoint),
            expert_parallel=settings.expert_parallel,
        )

    def _check_capacity(self, num_blocks: int, block_bytes: int) -> None:
        settings = self._settings
        tokens = num_blocks * settings.block_size
        if num_blocks == 0:
            raise ConfigurationError(
                f"no room for the KV cache: a block of {settings.block_size} tokens takes {block_bytes} bytes of each "
                f"rank; raise the KV cache's memory (now {settings.kv_cache_bytes or 'what is free'})"
            )
        if tokens < settings.max_model_len:
            logger.warning(
                "the KV cache holds %d tokens (%d blocks of %d), less than the context of %d: requests that need more "
                "are refused",
                tokens,
                num_blocks,
                settings.block_size,
                settings.max_model_len,
            )


class LoadProgress:
    """Turns the ranks' progress messages into the world's."""

    def __init__(self, status: EngineStatus, world_size: int) -> None:
        self._status = status
        self._world_size = world_size
        self._seen: dict[int, worker_pb2.Progress] = {}

    def __call__(self, rank: int, progress: worker_pb2.Progress) -> None:
        """Takes one message; only bytes of weights count."""
        if progress.what != "weights" or not progress.total_bytes:
            return
        self._seen[rank] = progress
        done = sum(entry.done_bytes for entry in self._seen.values())
        # Shards are of nearly the same size: those not heard of yet count as the others.
        total = sum(entry.total_bytes for entry in self._seen.values()) * self._world_size // len(self._seen)
        self._status.set_progress(rank, 100.0 * progress.done_bytes / progress.total_bytes, done, total)


async def _get_status(channel: RankChannel) -> worker_pb2.GetStatusResponse | RankFailure:
    try:
        return await channel.get_status(_STATUS_SECONDS)
    except grpc.aio.AioRpcError as error:
        message = f"does not answer GetStatus ({error.code().name}: {error.details()})"
        silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        return RankFailure(channel.endpoint.rank, message, worker_pb2.ERROR_KIND_DEADLINE if silent else None)
    except WrongRankError as error:
        return RankFailure(channel.endpoint.rank, str(error))


async def _drop_shards(pool: Pool) -> None:
    """After a failed load: the ranks that did load must not keep a shard that nobody will use."""
    try:
        await pool.unload()
    except PoolError as error:
        logger.info("not every rank had a shard to drop: %s", error, extra={"epoch": pool.epoch})
