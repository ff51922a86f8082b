"""The life of the world: forming, loading, serving, rebuilding, failed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from tpmodel.v1 import worker_pb2
from tpmodel_worker.attempts import STALE
from tpmodel_worker.engine.budget import RebuildBudget
from tpmodel_worker.engine.build import BuildError, BuiltWorld, GangCache, WorldBuilder
from tpmodel_worker.engine.errors import (
    ConfigurationError,
    NewerGenerationError,
    PoolError,
    RankFailure,
    StaleAttemptError,
)
from tpmodel_worker.engine.loop import ServingLoop, Sink
from tpmodel_worker.engine.members import Members, Membership
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.rebuild import Rebuilder, RebuildsSpentError
from tpmodel_worker.engine.recovery import Recovery
from tpmodel_worker.engine.replay import Replay
from tpmodel_worker.engine.requests import SchedulerConfig
from tpmodel_worker.engine.scheduler import Scheduler
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.supervisors import Supervisors
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

NOT_BUILT = "world not built yet"
MAX_LOAD_ATTEMPTS = 3
_FIRST_BACKOFF_SECONDS = 0.2
_LONGEST_BACKOFF_SECONDS = 5.0
_WAITING_SECONDS = 15.0
"""A start takes a while; ranks that are missing for longer are worth a warning."""
# What no second attempt changes: a person has to change the model, the checkpoint or the settings.
_CONFIGURATION_KINDS = frozenset(
    {
        worker_pb2.ERROR_KIND_UNSUPPORTED_MODEL,
        worker_pb2.ERROR_KIND_BAD_CHECKPOINT,
        worker_pb2.ERROR_KIND_INVALID_ARGUMENT,
    }
)


class World:
    """Forms the world whenever every rank is there, serves with it, and says so when it is lost for good.

    A world is built only of complete gangs, and is built when every rank has confirmed all of it. What
    fails before that is tried again: at once when a registration changes, else with growing pauses. What
    fails while it serves ends it in mode Restart; in mode InPlace the next epoch takes its place.
    """

    def __init__(
        self,
        settings: ServeSettings,
        builder: WorldBuilder,
        members: Members,
        supervisors: Supervisors,
        budget: RebuildBudget,
        *,
        wake: asyncio.Event,
        sink: Sink,
        status: EngineStatus,
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """wake: the event that the builder's pools set; sink: takes the outputs of requests."""
        self._settings = settings
        self._builder = builder
        self._members = members
        self._wake = wake
        self._sink = sink
        self._status = status
        self._metrics = metrics
        self._clock = clock
        self._budget = budget
        self._rebuilder = Rebuilder(
            builder,
            members,
            supervisors,
            budget,
            status=status,
            metrics=metrics,
            clock=clock,
            judge=self._give_up,
        )
        self._recovery = Recovery(
            self._rebuilder,
            budget,
            patience=settings.rebuild_wait,
            status=status,
            metrics=metrics,
            clock=clock,
            faults=self,
        )
        self._building = asyncio.Lock()
        self._built: BuiltWorld | None = None
        self._loop: ServingLoop | None = None
        self._load_attempts = 0
        self.on_serving: Callable[[ServingLoop], None] = lambda _loop: None
        """Called when a world is about to serve, before its first plan."""

    @property
    def loop(self) -> ServingLoop | None:
        """Where requests go; None while there is no world."""
        return self._loop

    @property
    def pool(self) -> Pool | None:
        """The ranks of the built world."""
        return self._built.pool if self._built is not None else None

    @property
    def kv(self) -> GangCache | None:
        """The built world's KV cache."""
        return self._built.kv if self._built is not None else None

    @property
    def built(self) -> bool:
        """True from every rank's confirmation to the end of the world."""
        return self._built is not None

    async def run(self) -> None:
        """Forms and serves; returns after stop(), or when the world has failed for good (PHASE_FAILED)."""
        built = await self._form()
        if built is not None and not self._failed:
            await self._serve(built)
        if self._failed:
            if self._loop is not None:
                self._loop.fail_all(f"{NOT_BUILT}: the world failed")
            await self.close()

    async def build(self, membership: Membership) -> BuiltWorld:
        """Builds the world of these members; where one is built, that one. Raises BuildError, ConfigurationError."""
        async with self._building:
            if self._built is None:
                self._built = await self._builder.build(membership)
            return self._built

    def fail_as_stale(self, message: str) -> None:
        """Gives up for good, whatever the world is doing: another set of pods has taken its place."""
        self.fail(ExitCode.RESTART_GANG, f"{STALE}{message}")
        if self._built is not None:
            self._built.pool.fault("the engine is outdated", StaleAttemptError(message))
        self._recovery.cancel()

    def rank_exited(self, rank: int, pid: int, how: str) -> None:
        """A supervisor has seen the end of a rank's process."""
        if self._builder.pool is not None:
            self._builder.pool.rank_exited(rank, pid, how)

    def newer_generation(self, source: str, generation: int) -> None:
        """A source asks for the next world: what is built is lost, what is not built is tried at once (W26)."""
        what = f"generation {generation} of {source}"
        logger.warning("%s: the next epoch follows", what, extra={"epoch": self._status.state.epoch})
        if self._built is not None:
            self._built.pool.fault("another world is asked for", NewerGenerationError(what))
        else:
            self._members.touch()

    def registered(self) -> None:
        """A pod has presented its ranks: one that the world does not know takes the place of one that it had."""
        self._builder.rendezvous_is(self._members.rendezvous)
        if self._built is None or not self._settings.rebuilds:
            return
        for rank, endpoint in self._members.endpoints.items():
            self._built.pool.rank_replaced(rank, endpoint.pid)

    def stop(self) -> None:
        """Ends serving, or rebuilding; the ranks stay until close()."""
        if self._loop is not None:
            self._loop.stop()
        self._recovery.cancel()

    async def close(self) -> None:
        """Ends a built world; bounded, idempotent. Its ranks hear Bye, unless other pods' wait for the next engine."""
        built, self._built, self._loop = self._built, None, None
        if built is None:
            return
        if self._settings.rebuilds and self._settings.pods > 1:
            await built.pool.abort("the engine ends")
            await built.pool.close()
        else:
            await built.pool.shutdown()

    # ------------------------------------------------------------------------------------- forming

    async def _form(self) -> BuiltWorld | None:
        """Waits for members and builds, until that succeeds; None when no further attempt is worth it."""
        if self._settings.rebuilds and self._budget.world_was_lost:
            # The engine of a world that served is gone: this one's first world is a rebuild of that.
            try:
                await self._rebuilder.spend("the engine ended while its world served")
            except RebuildsSpentError as error:
                self.fail(ExitCode.RESTART_GANG, str(error))
                return None
        backoff = _FIRST_BACKOFF_SECONDS
        failed = False
        while not self._failed:
            self._status.set_phase(worker_pb2.PHASE_FORMING)
            membership = self._members.complete
            if membership is None:
                await self._wait_for_members(expected=not failed)
                continue
            try:
                return await self.build(membership)
            except ConfigurationError as error:
                self.fail(ExitCode.CONFIGURATION, str(error))
                return None
            except BuildError as error:
                if self._give_up(error):
                    return None
                if self._settings.rebuilds:
                    await self._rebuilder.replace(error.to_replace)
            failed = True
            logger.warning("%s: trying again in %.1f s, or when a registration changes", NOT_BUILT, backoff)
            changed = await self._members.changed(membership.version, backoff)
            backoff = _FIRST_BACKOFF_SECONDS if changed else min(2 * backoff, _LONGEST_BACKOFF_SECONDS)
        return None

    async def _wait_for_members(self, *, expected: bool) -> None:
        """Returns when a registration has changed; says who is missing.

        expected: the gang is starting, so that nobody is missing for a fault's sake yet.
        """
        level = logging.INFO if expected else logging.WARNING
        while True:
            logger.log(level, "%s: waiting for %s", NOT_BUILT, ", ".join(self._members.missing))
            if await self._members.changed(self._members.version, _WAITING_SECONDS):
                return
            level = logging.WARNING

    def _give_up(self, failure: BuildError) -> bool:
        """Judges a failed build: True when the world has failed for good."""
        error = failure.error
        # A pod that a rebuild waits for is no fault of its own each time that it does not answer.
        waits = failure.stage == "meet" and self._loop is not None
        level = logging.INFO if waits else logging.WARNING
        logger.log(level, "the world could not be built: %s", error, extra={"epoch": self._status.state.epoch})
        if not waits:
            self.note(error)
        if isinstance(error.engine, StaleAttemptError):
            self.fail_as_stale(str(error.engine))
            return True
        if error.kinds & _CONFIGURATION_KINDS:
            self.fail(ExitCode.CONFIGURATION, str(error))
            return True
        if failure.stage != "load":
            return False
        self._load_attempts += self._loop is None  # a rebuild has a budget of its own
        if isinstance(error.engine, TimeoutError):
            seconds = self._settings.progress_deadline
            self.fail(ExitCode.RESTART_GANG, f"loading made no progress for {seconds:g} s: {error}")
            return True
        if self._load_attempts >= MAX_LOAD_ATTEMPTS:
            self.fail(ExitCode.RESTART_GANG, f"loading failed {self._load_attempts} times, last: {error}")
            return True
        return False

    # ------------------------------------------------------------------------------------- serving

    async def _serve(self, built: BuiltWorld) -> None:
        """Serves with this world and those that take its place, until stop() or the end for good."""
        scheduler = Scheduler(
            self._scheduler_config(built), clock=self._clock, weight_version=self._status.state.weight_version
        )
        loop = ServingLoop(scheduler, wake=self._wake, sink=self._sink, status=self._status, metrics=self._metrics)
        self._loop = loop
        replay: Replay | None = None
        while True:
            self._begin_to_serve(built)
            await loop.run(built.pool, replay)
            if built.pool.error is None:
                return
            if not self._settings.rebuilds or self._failed:
                self._loop = None
                error = await built.pool.failed()
                loop.fail_all(f"{NOT_BUILT}: the world failed")
                self.fail(ExitCode.RESTART_GANG, f"the serving world failed: {self.note(error)}")
                return
            self._built = None
            recovered = await self._recovery.run(built, loop)
            if recovered is None:
                return
            built, times, keys = recovered
            self._built = built
            loop.resume(self._scheduler_config(built))
            replay = self._recovery.replay(keys, built, times)

    def _begin_to_serve(self, built: BuiltWorld) -> None:
        settings = self._settings
        self._metrics.epoch.set(built.pool.epoch)
        logger.info(
            "serving %s on %d ranks: %d KV blocks of %d tokens",
            settings.served_name,
            built.pool.world_size,
            built.num_blocks,
            settings.block_size,
            extra={"epoch": built.pool.epoch},
        )
        self._budget.serving(self._clock())
        self._status.set_rebuilds_left(self._budget.left)
        assert self._loop is not None
        self.on_serving(self._loop)
        self._status.set_phase(worker_pb2.PHASE_SERVING)

    def _scheduler_config(self, built: BuiltWorld) -> SchedulerConfig:
        settings = self._settings
        return SchedulerConfig(
            num_blocks=built.num_blocks,
            block_size=settings.block_size,
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_model_len=settings.max_model_len,
            queue_limit=settings.queue_limit,
            prefix_cache=settings.prefix_cache and (not built.state_bytes or built.state_snapshots > 0),
            share_blocks=not built.state_bytes,
            state_snapshots=built.state_snapshots,
        )

    # ---------------------------------------------------------------------------------------- ends

    @property
    def _failed(self) -> bool:
        return self._status.phase == worker_pb2.PHASE_FAILED

    def note(self, error: PoolError, detection_seconds: float = 0.0) -> str:
        """Counts a fault and remembers it; its description, with the pods of the ranks that it names."""
        kind = error.fault_kind
        self._metrics.faults.labels(kind).inc()
        if detection_seconds:
            self._metrics.detection_seconds.labels(kind).observe(detection_seconds)
        self._status.add_fault(kind, str(error), detection_seconds=detection_seconds)
        return f"{error}{self._pods_of(error.ranks)}"

    def _pods_of(self, failures: Iterable[RankFailure]) -> str:
        """In which pods the ranks are, where there are several."""
        known = self._members.endpoints
        if len({endpoint.pod for endpoint in known.values()}) < 2:
            return ""
        named = [
            f"rank {failure.rank} is in pod {self._members.pod_name(known[failure.rank].pod)}"
            for failure in failures
            if failure.rank in known
        ]
        return f" ({', '.join(named)})" if named else ""

    def fail(self, code: ExitCode, cause: str) -> None:
        """The world has failed for good; what comes first is the cause."""
        if self._failed:
            return
        logger.error("the world has failed: %s", cause, extra={"epoch": self._status.state.epoch, "cause": cause})
        self._status.set_phase(worker_pb2.PHASE_FAILED, exit_code=code, cause=cause)
