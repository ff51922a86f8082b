"""The life of a live weight update in the engine: how far it is, and how it ends, whatever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Sequence

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import WEIGHTS_INCOMPLETE, WEIGHTS_LOADING, WEIGHTS_LOST, EngineStatus
from tpmodel_worker.engine.trainer_link import TrainerLink
from tpmodel_worker.engine.weight_errors import UpdateError, failure_of
from tpmodel_worker.engine.weight_pause import Pause
from tpmodel_worker.engine.weight_ranks import Background, UpdateRanks
from tpmodel_worker.engine.weight_stages import Stage, Turns, check_due, check_session
from tpmodel_worker.engine.weight_timers import SilenceTimer

logger = logging.getLogger(__name__)

UNAVAILABLE = 14
TRAINER_GONE = "the trainer has gone"
_DEADLINE_SECONDS = 120.0


class UpdateLife:
    """One update after the other; none is ever half over."""

    def __init__(
        self,
        world: ServedWorld,
        status: EngineStatus,
        ranks: UpdateRanks,
        background: Background,
        pause: Pause,
        turns: Turns,
    ) -> None:
        """pause: of generation, which goes on when an update ends; turns: of calls."""
        self._world = world
        self._status = status
        self._ranks = ranks
        self._background = background
        self._pause = pause
        self._turns = turns
        self._silence = SilenceTimer(self._on_silence)
        self._pool: Pool | None = None
        self._trainer: TrainerLink | None = None
        self._session = ""
        self.stage = Stage.IDLE
        self.shadow = False
        self.touched = False
        """In place: the weights in use may not be those that were committed last."""
        self.committing = False
        """Some ranks may have committed, others not."""
        self.complete = False
        """Transport indexed: every tensor of the set has come, and what is left to do needs no trainer."""
        self.deadline_seconds = _DEADLINE_SECONDS
        self.trainer_gone = False

    @property
    def pool(self) -> Pool | None:
        """The ranks that have joined the trainer's group; another world's are none of them."""
        return self._pool

    @property
    def served(self) -> weights_pb2.ServedVersion:
        """The version that tokens are made with; unset where there is none."""
        condition = self._status.weights_condition
        served = weights_pb2.ServedVersion(newest_version=self._status.newest_version)
        if self.touched or condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST):
            served.reason = condition if condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST) else WEIGHTS_INCOMPLETE
            served.message = self._status.state.weights_message or "an update is under way"
        elif not self._status.has_loaded:
            served.reason = WEIGHTS_LOADING
            served.message = "the engine has not loaded weights yet"
        else:
            served.version = self._status.state.weight_version
        return served

    def begin(self, pool: Pool, trainer: TrainerLink, *, shadow: bool, deadline_seconds: float) -> str:
        """The ranks are about to join. deadline_seconds: 0: the usual one. Returns the session, the only one now."""
        self._leave_trainer()
        self._session = secrets.token_hex(8)
        self._trainer, self.trainer_gone = trainer, False
        self._pool, self.stage = pool, Stage.IDLE
        self.shadow, self.complete, self.committing = shadow, False, False
        self.deadline_seconds = deadline_seconds or _DEADLINE_SECONDS
        self._background.start(self._outlive(trainer))
        return self._session

    def follow(self, step: int, seconds: float, *, progress_counts: bool = False) -> AsyncIterator[tuple[int, int]]:
        """As UpdateRanks.follow; it ends as well when the trainer does, whether the ranks notice that or not."""

        def ended() -> str:
            return TRAINER_GONE if self.trainer_gone else ""

        return self._ranks.follow(self._pool, step, seconds, progress_counts=progress_counts, ended=ended)

    def forget(self) -> None:
        """The world that was being updated is gone."""
        self.stage, self._pool, self._session = Stage.IDLE, None, ""
        self._cancel_timers()
        self._leave_trainer()

    def decided(self) -> None:
        """Every rank has committed: that is the version, whatever happens."""
        self.touched = self.complete = self.committing = False

    def lose_world(self, what: str, error: Exception) -> None:
        """The ranks cannot go on as they are; what they and their supervisors hold is sorted out by the next world."""
        if self._pool is not None and self._pool.error is None:
            self._pool.fault(what, error)
        logger.warning("%s: %s", what, error)
        self.forget()

    async def end(self, reason: str) -> None:
        """Every rank leaves the group; the gang serves what it can."""
        was, self.stage = self.stage, Stage.IDLE
        self._cancel_timers()
        self._leave_trainer()
        pool, loop = self._pool, self._world.loop
        self._pool, self.complete, self._session = None, False, ""
        if was is Stage.STARTED:
            logger.warning("the weight update was ended: %s", reason)
        if pool is not None and pool is self._world.pool and pool.error is None:
            replies = await self._abort_ranks(pool, reason)
            self.touched = self.touched and not self._is_whole(replies)
            if not replies and self.shadow and self.committing:
                pool.fault("a commit could not be taken back on every rank", RuntimeError(reason))
        if not self.touched:
            if loop is not None:
                self._pause.end(loop)
            return
        message = f"an update did not finish: {reason}; send a full set"
        self._status.set_weights_condition(WEIGHTS_INCOMPLETE, message)
        if loop is not None:
            loop.fail_with(UNAVAILABLE, f"{WEIGHTS_INCOMPLETE}: {message}")

    async def _abort_ranks(self, pool: Pool, reason: str) -> Sequence[worker_pb2.WeightUpdateOk]:
        """What the ranks answer; nothing where not every one of them has ended the update."""
        abort = worker_pb2.WeightUpdateRequest(abort=worker_pb2.AbortWeightUpdate(reason=reason))
        try:
            return await self._ranks.control(lambda _rank: abort, pool)
        except UpdateError as error:
            logger.warning("not every rank has ended the update: %s", error)
            return ()

    def _is_whole(self, replies: Sequence[worker_pb2.WeightUpdateOk]) -> bool:
        """Whether every rank has the weights that are served."""
        if self._status.weights_condition in (WEIGHTS_INCOMPLETE, WEIGHTS_LOST):
            return False
        served = self._status.state.weight_version
        held = [reply.weight_version if reply.HasField("weight_version") else None for reply in replies]
        return bool(held) and all(version == served for version in held)

    def close(self) -> None:
        """The engine ends: no timer and no connection is left behind."""
        self._cancel_timers()
        self._leave_trainer()

    @contextlib.asynccontextmanager
    async def or_end(self, cancelled: str) -> AsyncIterator[None]:
        """Whatever goes wrong inside ends the update. cancelled: what it means when the call is cancelled."""
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            await asyncio.shield(self._background.start(self.end(cancelled)))
            raise
        except (UpdateError, PoolError) as error:
            await self.end(str(error))
            if isinstance(error, PoolError):
                raise failure_of(error) from error
            raise

    @contextlib.asynccontextmanager
    async def call(self, *due: Stage, session: str | None = None) -> AsyncIterator[None]:
        """One call at a time, and only where it is due. session: the caller's; None: it needs none."""
        # Also before its turn: the other trainer's call may last.
        self._check_session(session)
        async with self._turns.call():
            try:
                if self._pool is not None and self._pool is not self._world.pool:
                    self.forget()
                self._check_session(session)
                check_due(self.stage, due)
                self._silence.stop()
                yield
            finally:
                if self.stage is Stage.STARTED:
                    self._silence.start(self.deadline_seconds)

    def _check_session(self, session: str | None) -> None:
        if session is not None:
            check_session(session, self._session)

    def _on_silence(self) -> None:
        async def end() -> None:
            async with self._turns.between_calls():
                if self.stage is Stage.STARTED:
                    await self.end(f"the trainer said nothing for {self.deadline_seconds:g} s")

        self._background.start(end())

    async def _outlive(self, trainer: TrainerLink) -> None:
        """Ends the update when the trainer does, also between two of its calls."""
        await trainer.gone()
        if self._trainer is not trainer:
            return
        # First of all, for the call that may be waiting for it.
        self.trainer_gone = True
        async with self._turns.between_calls():
            if self._trainer is trainer and not self.complete:
                await self.end(TRAINER_GONE)

    def _leave_trainer(self) -> None:
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None

    def _cancel_timers(self) -> None:
        self._silence.stop()
        self._pause.cancel()
