"""The fault that ends an epoch: everybody's account of it, and the abort that follows on every rank."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.abort import abort_everywhere
from tpmodel_worker.engine.errors import FATAL_KINDS, PoolError, RankFailure
from tpmodel_worker.engine.session import RankChannel, RankEndpoint, Session

logger = logging.getLogger(__name__)


class EpochEnd:
    """The first fault of an epoch and what came of it. What is reported later only adds to it."""

    def __init__(
        self, channels: Sequence[RankChannel], sessions: Sequence[Session], *, epoch: int, drain_seconds: float
    ) -> None:
        """Channels and sessions: one for each rank, by rank. drain_seconds: for every rank to leave the epoch."""
        self.error: PoolError | None = None
        """None: there was no fault."""
        self.silent: frozenset[int] = frozenset()
        """Ranks that did not even answer Ping; set before the fault."""
        self._channels = channels
        self._sessions = sessions
        self._epoch = epoch
        self._drain_seconds = drain_seconds
        self._unconfirmed: frozenset[int] = frozenset()
        self._abort: asyncio.Task[None] | None = None

    @property
    def aborting(self) -> bool:
        """Whether the ranks leave the epoch, or have left it."""
        return self._abort is not None

    @property
    def to_replace(self) -> list[RankEndpoint]:
        """After the abort: ranks that did not confirm it, or whose device is lost. Their processes are of no use."""
        failures = self.error.ranks if self.error is not None else ()
        broken = {failure.rank for failure in failures if failure.kind in FATAL_KINDS}
        gone = {failure.rank for failure in failures if failure.exited}
        return [self._channels[rank].endpoint for rank in sorted((self._unconfirmed | broken) - gone)]

    def fault(self, what: str, *, engine: Exception | None = None, ranks: Sequence[RankFailure] = ()) -> bool:
        """Something went wrong while nobody waited for an answer. True: it was the first, and the abort begins."""
        if self.error is not None:
            # What a rank says because it was aborted is no news.
            news = [
                failure for failure in ranks if failure.kind != worker_pb2.ERROR_KIND_ABORTED and not failure.closed
            ]
            self.error = self.error.with_ranks(news)
            return False
        self.error = PoolError(what, engine=engine, ranks=ranks)
        self.log_cause(self.error)
        self.begin_abort(str(self.error))
        return True

    def request_failed(self, error: PoolError) -> None:
        """A request failed while the abort runs: where a fault was found meanwhile, that is the cause of all others."""
        self.error = error if self.error is None else self.error.with_ranks(error.ranks)

    def process_ended(self, failure: RankFailure) -> None:
        """After a fault: what became of a rank's process."""
        if self.error is not None:
            self.error = self.error.with_exit(failure)

    def log_cause(self, error: PoolError) -> None:
        """Logs the engine's own part of a failure, where it has one."""
        if error.engine is not None:
            logger.warning("%s", error, exc_info=error.engine, extra={"epoch": self._epoch})

    def begin_abort(self, reason: str) -> None:
        """Ends the epoch on every rank, in the background; once."""
        if self._abort is None:
            self._abort = asyncio.create_task(self._abort_everywhere(reason), name=f"abort of epoch {self._epoch}")

    async def aborted(self) -> None:
        """Waits until every rank has left the epoch or was given up, if an abort has begun."""
        if self._abort is not None:
            await asyncio.shield(self._abort)

    async def failed(self) -> PoolError:
        """Waits until every rank has left the epoch or was given up, and returns the whole error."""
        await self.aborted()
        if self.error is None:
            raise RuntimeError("the pool has not failed")
        return self.error

    async def abort(self, reason: str) -> None:
        """Ends the epoch from outside whatever its ranks are doing; bounded, idempotent."""
        if self.error is None:
            self.error = PoolError(f"aborted: {reason}")
        self.begin_abort(reason)
        await self.failed()

    async def _abort_everywhere(self, reason: str) -> None:
        unconfirmed = await abort_everywhere(
            self._channels,
            self._sessions,
            epoch=self._epoch,
            reason=reason,
            drain_seconds=self._drain_seconds,
            silent=self.silent,
        )
        self._unconfirmed = frozenset(failure.rank for failure in unconfirmed)
        if self.error is not None:
            self.error = self.error.with_ranks(unconfirmed)
