"""All ranks of one epoch as one: control requests that drain every rank, and plans that run ahead."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.epoch_end import EpochEnd
from tpmodel_worker.engine.errors import (
    ChecksumError,
    PoolError,
    ProtocolError,
    RankFailure,
    SanityCheckError,
    SessionClosedError,
    StepDeadlineError,
    closed_before_reply,
)
from tpmodel_worker.engine.exchange import ControlRequest, Patience, ProgressCallback
from tpmodel_worker.engine.plan_stream import PlanStream
from tpmodel_worker.engine.plans import PlanTimes
from tpmodel_worker.engine.rank_control import RankControl
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
        self._timeouts = timeouts or PoolTimeouts()
        self._plans = PlanStream(self.world_size, times, epoch=epoch, wake=wake)
        self._silence = 0.0
        self._close: asyncio.Task[None] | None = None
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
        drain = self._timeouts.drain
        self._end = EpochEnd(channels, self._sessions, epoch=epoch, drain_seconds=drain)
        self._control = RankControl(
            self._sessions, self._plans, self._end, epoch=epoch, drain_seconds=drain, settle=self.settle
        )
        watch = watch_steps(
            self._plans.window,
            channels,
            epoch=epoch,
            sent=self._plans.news,
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
        return await self._control.request(requests, patience, collective=collective, on_progress=on_progress)

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
            self._end.log_cause(error)
            raise error

    async def clear_kv_cache(self, num_blocks: int, *, state_snapshots: int = 0) -> None:
        """Sizes every rank's KV cache (num_blocks 0: all of it as it is) and empties it. Raises PoolError."""
        request = worker_pb2.ClearKvCacheRequest(num_blocks=num_blocks, state_snapshots=state_snapshots)
        await self.control([request] * self.world_size, Patience(self._timeouts.clear))

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

    # --------------------------------------------------------------------------------------- plans

    @property
    def next_seq(self) -> int:
        """The seq of the next request, whichever it is."""
        return self._plans.next_seq

    @property
    def may_send_plan(self) -> bool:
        """Whether a plan may go out now: fewer than two outstanding, nobody too far behind, no fault."""
        return self._end.error is None and self._control.exchange is None and self._plans.window.may_send

    @property
    def error(self) -> PoolError | None:
        """The fault that ended this epoch; failed() waits for everybody's account of it."""
        return self._end.error

    @property
    def detection_seconds(self) -> float:
        """From the last sign of life to the fault; 0: no plan was under way."""
        return self._silence

    @property
    def to_replace(self) -> list[RankEndpoint]:
        """After the abort: ranks that did not confirm it, or whose device is lost. Their processes are of no use."""
        return self._end.to_replace

    def send_plan(self, plan: worker_pb2.GenerateStepRequest) -> int:
        """Sends a plan to every rank as next_seq and returns its bytes; never waits. Needs may_send_plan."""
        if not self.may_send_plan:
            raise RuntimeError("a plan was sent while none may be")
        request = self._plans.begin(plan)
        for session in self._sessions:
            try:
                session.send(request)
            except SessionClosedError as error:
                self._fault("a plan could not be sent", engine=error, ranks=[closed_before_reply(session.rank, "")])
        return len(request)

    def take_replies(self) -> list[tuple[int, worker_pb2.GenerateStepOk]]:
        """Rank 0's replies since the last call, with their seq, in order."""
        return self._plans.take_replies()

    async def settle(self) -> None:
        """Returns once every rank has done everything that was sent. Raises PoolError after a fault."""
        window = self._plans.window
        await self._until(lambda: window.may_send)
        if not window.settled:
            self.send_plan(self._plans.settling_plan())
        await self._until(lambda: window.settled)

    async def _until(self, condition: Callable[[], bool]) -> None:
        # Bounded by the step deadline, which turns a silence into a fault.
        while True:
            if self._end.error is not None:
                raise await self.failed()
            if condition():
                return
            self._plans.news.clear()
            await self._plans.news.wait()

    # ------------------------------------------------------------------------------------- replies

    def _on_response(self, rank: int, response: worker_pb2.SessionResponse) -> None:
        stale = response.WhichOneof("response") == "error" and response.error.kind == worker_pb2.ERROR_KIND_STALE_EPOCH
        if response.epoch != self.epoch and not stale:
            logger.warning("rank %d answered for epoch %d", rank, response.epoch, extra={"epoch": self.epoch})
        elif (exchange := self._control.exchange) is not None and response.seq == exchange.seq:
            exchange.receive(rank, response)
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
        elif self._end.error is None:
            self._on_step(rank, seq, response.generate_step_ok)

    def _on_step(self, rank: int, seq: int, reply: worker_pb2.GenerateStepOk) -> None:
        try:
            self._plans.answered(rank, seq, reply)
        except ChecksumError as error:
            self._fault("the ranks disagree", engine=error)
        except ProtocolError as error:
            self._fault("an answer does not fit the plans", engine=error)
        self._plans.notify()

    def _on_closed(self, rank: int, detail: str) -> None:
        if self._control.exchange is not None:
            self._control.exchange.closed(rank, detail)
        elif not self._control.leaving:
            self._fault("a session has ended", ranks=[closed_before_reply(rank, detail)])

    def _on_step_deadline(self, error: StepDeadlineError, silent: Sequence[RankFailure]) -> None:
        self._end.silent = frozenset(failure.rank for failure in silent)
        self._fault("the ranks hang", engine=error, ranks=silent)

    # -------------------------------------------------------------------------------------- the end

    def fault(self, what: str, cause: Exception) -> None:
        """The engine has found that this world can't go on: aborts it on every rank, in the background."""
        self._fault(what, engine=cause)

    def rank_exited(self, rank: int, pid: int, how: str) -> None:
        """A supervisor has seen the end of a process; nothing happens if it was not this epoch's."""
        if self._control.leaving or self._channels[rank].endpoint.pid != pid:
            return
        failure = RankFailure(rank, how, closed=True, exited=True)
        if self._end.error is not None:
            self._end.process_ended(failure)
        elif self._control.exchange is None:
            self._fault("a rank's process has ended", ranks=[failure])

    def rank_replaced(self, rank: int, pid: int) -> None:
        """A rank's process is this one now; nothing happens if it is this epoch's."""
        known = self._channels[rank].endpoint.pid
        if pid != known and self._end.error is None and not self._control.leaving:
            self._fault(
                "a rank has another process",
                ranks=[RankFailure(rank, f"its process is {pid}, was {known}", closed=True, exited=True)],
            )

    async def failed(self) -> PoolError:
        """Waits until every rank has left the epoch or was given up, and returns the whole error."""
        return await self._end.failed()

    async def fails_within(self, seconds: float) -> bool:
        """Whether the epoch has ended by a fault, now or before the time is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._until(lambda: False)
        except PoolError:
            return True
        except TimeoutError:
            return self._end.error is not None
        raise AssertionError("nothing else ends the wait")

    async def abort(self, reason: str) -> None:
        """Ends the epoch on every rank, from outside whatever they are doing; bounded, idempotent."""
        await self._end.abort(reason)

    async def shutdown(self) -> None:
        """Says Bye to every rank and closes the pool; bounded, idempotent. Failures are logged."""
        if self._end.error is None and not self._control.leaving:
            try:
                async with asyncio.timeout(self._timeouts.shutdown):
                    await self.settle()
                self._control.leaving = True
                requests = [worker_pb2.ShutdownRequest()] * self.world_size
                await self.control(requests, Patience(self._timeouts.shutdown))
            except PoolError as error:
                logger.warning("not every rank said goodbye: %s", error, extra={"epoch": self.epoch})
            except TimeoutError:
                await self.abort("the ranks did not settle for the shutdown")
        await self.close()

    async def close(self) -> None:
        """Closes every session and channel; idempotent. Aborts nothing."""
        self._control.leaving = True
        if self._close is None:
            self._close = asyncio.create_task(self._close_all(), name=f"close of epoch {self.epoch}")
        await asyncio.shield(self._close)

    async def _close_all(self) -> None:
        self._watcher.cancel()
        await self._end.aborted()
        await asyncio.gather(*(session.close(self._timeouts.close) for session in self._sessions))
        await asyncio.gather(*(channel.close() for channel in self._channels))

    def _fault(self, what: str, *, engine: Exception | None = None, ranks: Sequence[RankFailure] = ()) -> None:
        if self._end.fault(what, engine=engine, ranks=ranks):
            self._silence = self._plans.window.silence(time.monotonic())
            self._plans.notify()
