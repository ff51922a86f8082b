"""All ranks of one epoch as one: control requests that drain every rank, and plans that run ahead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.abort import abort_everywhere
from tpmodel_worker.engine.errors import (
    FATAL_KINDS,
    ChecksumError,
    PoolError,
    ProtocolError,
    RankFailure,
    SanityCheckError,
    SessionClosedError,
    StepDeadlineError,
    closed_before_reply,
)
from tpmodel_worker.engine.exchange import (
    ControlExchange,
    ControlRequest,
    Patience,
    ProgressCallback,
    control_name,
    wrap,
)
from tpmodel_worker.engine.plans import PlanTimes, PlanWindow
from tpmodel_worker.engine.session import RankChannel, RankEndpoint, Session
from tpmodel_worker.engine.watch import watch_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PoolTimeouts:
    """Seconds that the ranks have for what is neither joining, loading nor a step."""

    drain: float = 2.0
    """After a fault, for every rank to leave the epoch."""
    ping: float = 2.0
    clear: float = 60.0
    shutdown: float = 5.0
    close: float = 1.0
    """For a session to end by itself once it is not needed any more."""


class Pool:
    """The sessions to all ranks of one epoch.

    A control request goes to every rank and is over when every rank has answered, failed or run out of
    time. Plans run ahead of their replies. The first fault (an Error to a plan, a session that ends, a
    difference between ranks, a step past its deadline) aborts the epoch on every rank; from then on every
    call raises the PoolError that says so.
    """

    def __init__(
        self,
        channels: Sequence[RankChannel],
        *,
        epoch: int,
        instance_id: str,
        times: PlanTimes,
        wake: Callable[[], None],
        timeouts: PoolTimeouts | None = None,
    ) -> None:
        """Opens the sessions; needs a running event loop.

        channels: one for each rank, by rank; the pool closes them. wake is called whenever there is
        something new for the serving loop: replies, room for a plan, a fault.
        """
        self.epoch = epoch
        self.world_size = len(channels)
        self._channels = channels
        self._wake = wake
        self._timeouts = timeouts or PoolTimeouts()
        self._window = PlanWindow(self.world_size, times)
        self._next_seq = 1
        self._settling_seq = 0
        self._replies: deque[tuple[int, worker_pb2.GenerateStepOk]] = deque()
        self._exchange: ControlExchange | None = None
        self._control_turn = asyncio.Lock()
        self._error: PoolError | None = None
        self._silence = 0.0
        self._unconfirmed: frozenset[int] = frozenset()
        self._silent: frozenset[int] = frozenset()
        """Ranks that did not even answer Ping."""
        self._abort: asyncio.Task[None] | None = None
        self._leaving = False
        self._close: asyncio.Task[None] | None = None
        # Set whenever plans, replies or faults change something; every waiter looks for itself.
        self._news = asyncio.Event()
        self._sessions = [
            Session(
                channel,
                epoch=epoch,
                instance_id=instance_id,
                on_response=self._on_response,
                on_closed=self._on_closed,
            )
            for channel in channels
        ]
        watch = watch_steps(
            self._window,
            channels,
            epoch=epoch,
            sent=self._news,
            ping_timeout=self._timeouts.ping,
            on_fault=self._on_step_deadline,
        )
        self._watcher = asyncio.create_task(watch, name=f"step deadline of epoch {epoch}")

    # ------------------------------------------------------------------------------------- control

    async def control(
        self,
        requests: Sequence[ControlRequest],
        patience: Patience,
        *,
        collective: bool = False,
        on_progress: ProgressCallback | None = None,
    ) -> list[worker_pb2.SessionResponse]:
        """Sends one control request to each rank (all of one type) and collects the replies, by rank.

        One at a time: others wait for their turn. All plans are settled first.

        collective: ranks that wait for one that has failed do not come back
        by themselves, so the first failure aborts the epoch. Raises PoolError, once every rank is drained.
        """
        async with self._control_turn:
            return await self._control(requests, patience, collective, on_progress)

    async def _control(
        self,
        requests: Sequence[ControlRequest],
        patience: Patience,
        collective: bool,
        on_progress: ProgressCallback | None,
    ) -> list[worker_pb2.SessionResponse]:
        name = control_name(requests[0])
        await self.settle()
        seq = self._take_seq()
        exchange = ControlExchange(type(requests[0]), seq, self.world_size, patience, on_progress)
        self._exchange = exchange
        try:
            unsent = self._fan_out(exchange, requests)
            late = await self._drain(exchange, collective)
        finally:
            self._exchange = None
        if self._abort is None and not self._leaving:
            self._note_lost_sessions(exchange)
        if unsent or late or exchange.failures:
            error = PoolError(f"{name} failed", engine=unsent or late, ranks=exchange.failures.values())
            self._log_local_failure(error)
            if self._abort is not None:
                # Where the engine has found a fault meanwhile, that is the cause of all others.
                found = self._error
                self._error = error if found is None else found.with_ranks(error.ranks)
                error = await self.failed()
            raise error
        self._window.passed(seq)
        return [exchange.replies[rank] for rank in range(self.world_size)]

    async def sanity_check(self, patience: Patience) -> None:
        """All-reduces ones and checks what every rank saw. Raises PoolError."""
        requests = [worker_pb2.NcclSanityCheckRequest()] * self.world_size
        replies = await self.control(requests, patience, collective=True)
        wrong = [
            RankFailure(rank, f"observed a sum of {reply.nccl_sanity_result.observed_sum:g}")
            for rank, reply in enumerate(replies)
            if reply.nccl_sanity_result.observed_sum != self.world_size
        ]
        if wrong:
            engine = SanityCheckError(f"an all-reduce of ones should give {self.world_size} on every rank")
            error = PoolError("nccl_sanity_check failed", engine=engine, ranks=wrong)
            self._log_local_failure(error)
            raise error

    async def clear_kv_cache(self, num_blocks: int) -> None:
        """Sizes every rank's KV cache (0: as it is) and empties it. Raises PoolError."""
        requests = [worker_pb2.ClearKvCacheRequest(num_blocks=num_blocks)] * self.world_size
        await self.control(requests, Patience(self._timeouts.clear))

    async def unload(self) -> int:
        """Makes every rank drop its shard; the bytes that this freed. Raises PoolError."""
        requests = [worker_pb2.UnloadModelRequest()] * self.world_size
        replies = await self.control(requests, Patience(self._timeouts.clear))
        return sum(reply.unloaded.freed_bytes for reply in replies)

    async def ping(self, rank: int) -> worker_pb2.PingResponse:
        """A sign of life of one rank, also while it is busy. Raises WrongRankError or AioRpcError."""
        return await self._channels[rank].ping(self._timeouts.ping)

    async def statuses(self) -> list[worker_pb2.GetStatusResponse]:
        """Every rank's account of itself, by rank, also while they are busy. Raises WrongRankError or AioRpcError."""
        return list(await asyncio.gather(*(channel.get_status(self._timeouts.ping) for channel in self._channels)))

    async def kv_outcomes(self, transfer: str) -> list[worker_pb2.AwaitKvTransferResponse]:
        """How each rank's part of a KV transfer ended, by rank, once all have. Raises AioRpcError."""
        return list(await asyncio.gather(*(channel.await_kv_transfer(transfer) for channel in self._channels)))

    async def cancel_kv(self, transfer: str, reason: str, timeout: float) -> None:
        """Ends a KV transfer on every rank: nothing reads or writes its blocks any more. Raises AioRpcError."""
        await asyncio.gather(*(channel.cancel_kv_transfer(transfer, reason, timeout) for channel in self._channels))

    def _fan_out(self, exchange: ControlExchange, requests: Sequence[ControlRequest]) -> Exception | None:
        """Sends to every rank, whatever happens to the others; the first failure to send."""
        first: Exception | None = None
        for rank, request in enumerate(requests):
            try:
                self._sessions[rank].send(wrap(request, self.epoch, exchange.seq))
            except SessionClosedError as error:
                first = first or error
                exchange.closed(rank, "")
        return first

    async def _drain(self, exchange: ControlExchange, collective: bool) -> Exception | None:
        """Waits for every rank's final reply; the engine's own failure, if it had one."""
        timeout: TimeoutError | None = None
        while exchange.pending:
            if self._abort is None and any(failure.closed or collective for failure in exchange.failures.values()):
                self._begin_abort("; ".join(str(failure) for failure in exchange.failures.values()))
                exchange.limit(self._timeouts.drain)
            if await exchange.change():
                continue
            late = ", ".join(str(rank) for rank in sorted(exchange.pending))
            if self._abort is None:
                timeout = TimeoutError(f"no final reply to {exchange.name} in time from rank {late}")
                self._begin_abort(str(timeout))
                exchange.limit(self._timeouts.drain)
            else:
                for rank in sorted(exchange.pending):
                    exchange.fail(RankFailure(rank, f"no reply within {self._timeouts.drain:g} s of the abort"))
        return timeout

    def _note_lost_sessions(self, exchange: ControlExchange) -> None:
        """A session that ended after its reply is lost all the same, and with it the epoch."""
        for session in self._sessions:
            if session.closed:
                exchange.failures.setdefault(session.rank, RankFailure(session.rank, "session closed", closed=True))
        lost = [str(failure) for failure in exchange.failures.values() if failure.closed]
        if lost:
            self._begin_abort("; ".join(lost))

    # --------------------------------------------------------------------------------------- plans

    @property
    def next_seq(self) -> int:
        """The seq of the next request, whichever it is."""
        return self._next_seq

    @property
    def may_send_plan(self) -> bool:
        """Whether a plan may go out now: fewer than two outstanding, nobody too far behind, no fault."""
        return self._error is None and self._exchange is None and self._window.may_send

    @property
    def error(self) -> PoolError | None:
        """The fault that ended this epoch; failed() waits for everybody's account of it."""
        return self._error

    @property
    def detection_seconds(self) -> float:
        """From the last sign of life to the fault; 0: no plan was under way."""
        return self._silence

    @property
    def to_replace(self) -> list[RankEndpoint]:
        """After the abort: ranks that did not confirm it, or whose device is lost. Their processes are of no use."""
        failures = self._error.ranks if self._error is not None else ()
        broken = {failure.rank for failure in failures if failure.kind in FATAL_KINDS}
        gone = {failure.rank for failure in failures if failure.exited}
        return [self._channels[rank].endpoint for rank in sorted((self._unconfirmed | broken) - gone)]

    def send_plan(self, plan: worker_pb2.GenerateStepRequest) -> int:
        """Sends a plan to every rank as next_seq and returns its bytes; never waits. Needs may_send_plan."""
        if not self.may_send_plan:
            raise RuntimeError("a plan was sent while none may be")
        seq = self._take_seq()
        request = worker_pb2.SessionRequest(epoch=self.epoch, seq=seq, generate_step=plan).SerializeToString()
        self._window.sent(seq, plan, time.monotonic())
        self._news.set()
        for session in self._sessions:
            try:
                session.send(request)
            except SessionClosedError as error:
                self._fault("a plan could not be sent", engine=error, ranks=[closed_before_reply(session.rank, "")])
        return len(request)

    def take_replies(self) -> list[tuple[int, worker_pb2.GenerateStepOk]]:
        """Rank 0's replies since the last call, with their seq, in order."""
        replies = list(self._replies)
        self._replies.clear()
        return replies

    async def settle(self) -> None:
        """Returns once every rank has done everything that was sent. Raises PoolError after a fault."""
        await self._until(lambda: self._window.may_send)
        if not self._window.settled:
            self._settling_seq = self._next_seq
            self.send_plan(worker_pb2.GenerateStepRequest(steps=0, ack_now=True))
        await self._until(lambda: self._window.settled)

    async def _until(self, condition: Callable[[], bool]) -> None:
        # Bounded by the step deadline, which turns a silence into a fault.
        while True:
            if self._error is not None:
                raise await self.failed()
            if condition():
                return
            self._news.clear()
            await self._news.wait()

    # ------------------------------------------------------------------------------------- replies

    def _on_response(self, rank: int, response: worker_pb2.SessionResponse) -> None:
        stale = response.WhichOneof("response") == "error" and response.error.kind == worker_pb2.ERROR_KIND_STALE_EPOCH
        if response.epoch != self.epoch and not stale:
            logger.warning("rank %d answered for epoch %d", rank, response.epoch, extra={"epoch": self.epoch})
        elif self._exchange is not None and response.seq == self._exchange.seq:
            self._exchange.receive(rank, response)
        else:
            self._on_plan_response(rank, response)

    def _on_plan_response(self, rank: int, response: worker_pb2.SessionResponse) -> None:
        which = response.WhichOneof("response")
        seq = response.seq
        if which == "error":
            failure = RankFailure(rank, response.error.message, response.error.kind)
            self._fault(f"plan {seq} failed", ranks=[failure])
        elif which != "generate_step_ok":
            # The late end of a control request that has been given up: nobody waits for it.
            logger.warning("rank %d sent a late %s", rank, which, extra={"epoch": self.epoch, "seq": seq})
        elif self._error is None:
            self._on_step(rank, seq, response.generate_step_ok)

    def _on_step(self, rank: int, seq: int, reply: worker_pb2.GenerateStepOk) -> None:
        try:
            if rank != 0:
                self._window.acknowledged(rank, seq, reply, time.monotonic())
            else:
                self._window.answered(seq, reply, time.monotonic())
                if seq != self._settling_seq:
                    self._replies.append((seq, reply))
        except ChecksumError as error:
            self._fault("the ranks disagree", engine=error)
        except ProtocolError as error:
            self._fault("an answer does not fit the plans", engine=error)
        self._notify()

    def _on_closed(self, rank: int, detail: str) -> None:
        if self._exchange is not None:
            self._exchange.closed(rank, detail)
        elif not self._leaving:
            self._fault("a session has ended", ranks=[closed_before_reply(rank, detail)])

    def _on_step_deadline(self, error: StepDeadlineError, silent: Sequence[RankFailure]) -> None:
        self._silent = frozenset(failure.rank for failure in silent)
        self._fault("the ranks hang", engine=error, ranks=silent)

    def _notify(self) -> None:
        self._news.set()
        self._wake()

    def _take_seq(self) -> int:
        seq = self._next_seq
        self._next_seq += 1
        return seq

    # -------------------------------------------------------------------------------------- the end

    def fault(self, what: str, cause: Exception) -> None:
        """The engine has found that this world can't go on: aborts it on every rank, in the background."""
        self._fault(what, engine=cause)

    def rank_exited(self, rank: int, pid: int, how: str) -> None:
        """A supervisor has seen the end of a process; nothing happens if it was not this epoch's."""
        if self._leaving or self._channels[rank].endpoint.pid != pid:
            return
        failure = RankFailure(rank, how, closed=True, exited=True)
        if self._error is not None:
            self._error = self._error.with_exit(failure)
        elif self._exchange is None:
            self._fault("a rank's process has ended", ranks=[failure])

    def rank_replaced(self, rank: int, pid: int) -> None:
        """A rank's process is this one now; nothing happens if it is this epoch's."""
        known = self._channels[rank].endpoint.pid
        if pid != known and self._error is None and not self._leaving:
            self._fault(
                "a rank has another process",
                ranks=[RankFailure(rank, f"its process is {pid}, was {known}", closed=True, exited=True)],
            )

    async def failed(self) -> PoolError:
        """Waits until every rank has left the epoch or was given up, and returns the whole error."""
        if self._abort is not None:
            await asyncio.shield(self._abort)
        if self._error is None:
            raise RuntimeError("the pool has not failed")
        return self._error

    async def fails_within(self, seconds: float) -> bool:
        """Whether the epoch has ended by a fault, now or before the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: False)
        except PoolError:
            return True
        except TimeoutError:
            return self._error is not None
        raise AssertionError("nothing else ends the wait")

    async def abort(self, reason: str) -> None:
        """Ends the epoch on every rank, from outside whatever they are doing; bounded, idempotent."""
        if self._error is None:
            self._error = PoolError(f"aborted: {reason}")
        self._begin_abort(reason)
        await self.failed()

    async def shutdown(self) -> None:
        """Says Bye to every rank and closes the pool; bounded, idempotent. Failures are logged."""
        if self._error is None and not self._leaving:
            try:
                async with asyncio.timeout(self._timeouts.shutdown):
                    await self.settle()
                self._leaving = True
                requests = [worker_pb2.ShutdownRequest()] * self.world_size
                await self.control(requests, Patience(self._timeouts.shutdown))
            except PoolError as error:
                logger.warning("not every rank said goodbye: %s", error, extra={"epoch": self.epoch})
            except TimeoutError:
                await self.abort("the ranks did not settle for the shutdown")
        await self.close()

    async def close(self) -> None:
        """Closes every session and channel; idempotent. Aborts nothing."""
        self._leaving = True
        if self._close is None:
            self._close = asyncio.create_task(self._close_all(), name=f"close of epoch {self.epoch}")
        await asyncio.shield(self._close)

    async def _close_all(self) -> None:
        self._watcher.cancel()
        if self._abort is not None:
            await self._abort
        await asyncio.gather(*(session.close(self._timeouts.close) for session in self._sessions))
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def _fault(self, what: str, *, engine: Exception | None = None, ranks: Sequence[RankFailure] = ()) -> None:
        if self._error is not None:
            # What a rank says because it was aborted is no news.
            news = [
                failure for failure in ranks if failure.kind != worker_pb2.ERROR_KIND_ABORTED and not failure.closed
            ]
            self._error = self._error.with_ranks(news)
            return
        self._error = PoolError(what, engine=engine, ranks=ranks)
        self._silence = self._window.silence(time.monotonic())
        self._log_local_failure(self._error)
        self._begin_abort(str(self._error))
        self._notify()

    def _begin_abort(self, reason: str) -> None:
        if self._abort is None:
            self._abort = asyncio.create_task(self._abort_everywhere(reason), name=f"abort of epoch {self.epoch}")

    async def _abort_everywhere(self, reason: str) -> None:
        unconfirmed = await abort_everywhere(
            self._channels,
            self._sessions,
            epoch=self.epoch,
            reason=reason,
            drain_seconds=self._timeouts.drain,
            silent=self._silent,
        )
        self._unconfirmed = frozenset(failure.rank for failure in unconfirmed)
        if self._error is not None:
            self._error = self._error.with_ranks(unconfirmed)

    def _log_local_failure(self, error: PoolError) -> None:
        if error.engine is not None:
            logger.warning("%s", error, exc_info=error.engine, extra={"epoch": self.epoch})
