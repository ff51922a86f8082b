"""Control requests: one at a time, to every rank, and over when every rank has answered, failed or run out of time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.epoch_end import EpochEnd
from tpmodel_worker.engine.errors import PoolError, RankFailure, SessionClosedError
from tpmodel_worker.engine.exchange import (
    ControlExchange,
    ControlRequest,
    Patience,
    ProgressCallback,
    control_name,
    wrap,
)
from tpmodel_worker.engine.plan_stream import PlanStream
from tpmodel_worker.engine.session import Session


class RankControl:
    """The control requests of one epoch."""

    def __init__(
        self,
        sessions: Sequence[Session],
        plans: PlanStream,
        end: EpochEnd,
        *,
        epoch: int,
        drain_seconds: float,
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        """drain_seconds: what the ranks have after a fault. settle: returns once all plans sent are done."""
        self.exchange: ControlExchange | None = None
        """The request that is under way."""
        self.leaving = False
        """The epoch ends in good order: sessions that end are no fault."""
        self._sessions = sessions
        self._plans = plans
        self._end = end
        self._epoch = epoch
        self._drain_seconds = drain_seconds
        self._settle = settle
        self._turn = asyncio.Lock()

    async def request(
        self,
        requests: Sequence[ControlRequest],
        patience: Patience,
        *,
        collective: bool,
        on_progress: ProgressCallback | None,
    ) -> list[worker_pb2.SessionResponse]:
        """As Pool.control."""
        async with self._turn:
            return await self._request(requests, patience, collective, on_progress)

    async def _request(
        self,
        requests: Sequence[ControlRequest],
        patience: Patience,
        collective: bool,
        on_progress: ProgressCallback | None,
    ) -> list[worker_pb2.SessionResponse]:
        name = control_name(requests[0])
        await self._settle()
        seq = self._plans.take_seq()
        exchange = ControlExchange(type(requests[0]), seq, len(self._sessions), patience, on_progress)
        self.exchange = exchange
        try:
            unsent = self._fan_out(exchange, requests)
            late = await self._drain(exchange, collective)
        finally:
            self.exchange = None
        if not self._end.aborting and not self.leaving:
            self._note_lost_sessions(exchange)
        if unsent or late or exchange.failures:
            error = PoolError(f"{name} failed", engine=unsent or late, ranks=exchange.failures.values())
            self._end.log_cause(error)
            if self._end.aborting:
                self._end.request_failed(error)
                error = await self._end.failed()
            raise error
        self._plans.window.passed(seq)
        return [exchange.replies[rank] for rank in range(len(self._sessions))]

    def _fan_out(self, exchange: ControlExchange, requests: Sequence[ControlRequest]) -> Exception | None:
        """Sends to every rank, whatever happens to the others; the first failure to send."""
        first: Exception | None = None
        for rank, request in enumerate(requests):
            try:
                self._sessions[rank].send(wrap(request, self._epoch, exchange.seq))
            except SessionClosedError as error:
                first = first or error
                exchange.closed(rank, "")
        return first

    async def _drain(self, exchange: ControlExchange, collective: bool) -> Exception | None:
        """Waits for every rank's final reply; the engine's own failure, if it had one."""
        timeout: TimeoutError | None = None
        while exchange.pending:
            if not self._end.aborting and any(failure.closed or collective for failure in exchange.failures.values()):
                self._end.begin_abort("; ".join(str(failure) for failure in exchange.failures.values()))
                exchange.limit(self._drain_seconds)
            if await exchange.change():
                continue
            late = ", ".join(str(rank) for rank in sorted(exchange.pending))
            if not self._end.aborting:
                timeout = TimeoutError(f"no final reply to {exchange.name} in time from rank {late}")
                self._end.begin_abort(str(timeout))
                exchange.limit(self._drain_seconds)
            else:
                for rank in sorted(exchange.pending):
                    exchange.fail(RankFailure(rank, f"no reply within {self._drain_seconds:g} s of the abort"))
        return timeout

    def _note_lost_sessions(self, exchange: ControlExchange) -> None:
        """A session that ended after its reply is lost all the same, and with it the epoch."""
        for session in self._sessions:
            if session.closed:
                exchange.failures.setdefault(session.rank, RankFailure(session.rank, "session closed", closed=True))
        lost = [str(failure) for failure in exchange.failures.values() if failure.closed]
        if lost:
            self._end.begin_abort("; ".join(lost))
