"""The serving loop: plans to the ranks, rank 0's tokens to whoever waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Sequence

from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.planner import PlanCounts
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.replay import Replay
from tpmodel_worker.engine.requests import (
    UNAVAILABLE,
    Fetch,
    Held,
    ProtocolError,
    Request,
    SchedulerConfig,
    SequenceOutput,
)
from tpmodel_worker.engine.scheduler import Scheduler
from tpmodel_worker.engine.status import COUNTER_SECONDS, EngineStatus

logger = logging.getLogger(__name__)

Sink = Callable[[Sequence[SequenceOutput]], None]


class ServingLoop:
    """Keeps two plans outstanding while there is work; goes on with the same requests over any number of worlds.

    One pass commits the replies that have come, makes and sends plans, and only then hands the outputs
    on: nothing stands between a reply and the next plan.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        wake: asyncio.Event,
        sink: Sink,
        status: EngineStatus,
        metrics: EngineMetrics,
    ) -> None:
        """wake: set by the pools, and by whoever hands requests in; sink gets every output."""
        self._scheduler = scheduler
        self._wake = wake
        self._sink = sink
        self._status = status
        self._metrics = metrics
        self._stopping = False
        self._held = False
        self._interruptions = 0
        self.on_fetch: Callable[[Fetch], None] = lambda _fetch: None
        """Called with each request whose KV is to come from another gang, once it holds its blocks."""
        self.on_fetch_dropped: Callable[[Fetch], None] = lambda _fetch: None
        """Called when such a request has ended before its KV came."""
        self._passed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._published = PlanCounts()
        self._replay: Replay | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def submit(self, request: Request) -> None:
        """Takes a request; it waits for at most the plans already sent. Raises RefusedError."""
        self._scheduler.submit(request)
        self._metrics.prompt_tokens.inc(len(request.prompt_token_ids))
        self._idle.clear()
        self._wake.set()

    def cancel(self, key: Hashable, sample_index: int | None = None) -> bool:
        """Ends a request or one sample without output; its blocks go with the next plan. False: not live."""
        cancelled = self._scheduler.cancel(key, sample_index)
        if self._replay is not None and sample_index is None:
            self._replay.forget(key)
        self._wake.set()
        return cancelled

    async def run(self, pool: Pool, replay: Replay | None = None) -> None:
        """Serves until a fault ends the world (pool.error says so) or stop() is called.

        replay: told how far the requests of the world before are.
        """
        self._replay = replay
        async with self._publishing():
            while not self._stopping and pool.error is None:
                self._wake.clear()
                self._pass_on(self._step(pool))
                await self._wake.wait()

    async def hold(self) -> None:
        """Between two worlds: requests wait, and fail when their time is over. Runs until cancelled."""
        async with self._publishing():
            while True:
                self._wake.clear()
                self._pass_on(self._scheduler.expire(time.time()))
                await self._wake.wait()

    def suspend(self, patience: float, *, blame: bool) -> Held:
        """The world is lost: everything waits for the next one. As Scheduler.hold."""
        return self._scheduler.hold(patience, blame=blame)

    def resume(self, config: SchedulerConfig) -> None:
        """A new world, with an empty cache, takes all requests over."""
        self._scheduler.rebuild(config)

    @property
    def stopping(self) -> bool:
        """Whether stop() was called."""
        return self._stopping

    # --------------------------------------------------------------------------- weight updates

    @property
    def scheduler(self) -> Scheduler:
        """What plans are made by."""
        return self._scheduler

    def hold_plans(self) -> None:
        """Makes no more plans until release_plans."""
        self._held = True

    async def quiet(self) -> None:
        """Returns once all plans that were sent are answered, or the world is lost."""
        while self._scheduler.outstanding_plans and not self._stopping:
            await self.pass_once()

    def release_plans(self) -> None:
        """Makes plans again."""
        self._held = False
        self._wake.set()

    @contextlib.asynccontextmanager
    async def between_plans(self) -> AsyncIterator[None]:
        """Inside, no plan is under way and none is made, whoever else holds them."""
        self._interruptions += 1
        try:
            await self.quiet()
            yield
        finally:
            self._interruptions -= 1
            self._wake.set()

    def fetched(self, fetch: Fetch) -> None:
        """As Scheduler.fetched."""
        self._scheduler.fetched(fetch)
        self._wake.set()

    def fetch_failed(self, fetch: Fetch, code: int, message: str) -> None:
        """As Scheduler.fetch_failed."""
        self._scheduler.fetch_failed(fetch, code, message)
        self._pass_on(self._scheduler.take_outputs())
        self._wake.set()

    def end_handover(self, kept: Kept, *, fetched: bool) -> None:
        """As Scheduler.end_handover."""
        self._scheduler.end_handover(kept, fetched=fetched)
        self._wake.set()

    async def pass_once(self) -> None:
        """Returns after the next pass, or the end of run()."""
        self._passed.clear()
        await self._passed.wait()

    def fail_with(self, code: int, message: str) -> None:
        """Ends every live request. code: google.rpc.Code."""
        self._pass_on(self._scheduler.fail_all(code, message))
        self._wake.set()

    def adopt_weights(self, version: int, *, on_first: Callable[[], None] = lambda: None) -> None:
        """As Scheduler.adopt_weights. on_first: called with the first token that is made with them, for a request that
        had begun."""
        keys = self._scheduler.adopt_weights(version)
        if keys and self._replay is None:
            self._replay = Replay(keys, on_first=on_first, on_done=lambda: None)
        self._wake.set()

    def stop(self) -> None:
        """Makes run() return; plans outstanding are left to settle()."""
        self._stopping = True
        self._wake.set()

    def fail_all(self, message: str) -> None:
        """Ends every live request with UNAVAILABLE."""
        self._pass_on(self._scheduler.fail_all(UNAVAILABLE, message))

    async def idle(self, timeout: float) -> bool:
        """Waits until no request is live; False when that is not so in time."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def _pass_on(self, outputs: Sequence[SequenceOutput]) -> None:
        if self._replay is not None and self._replay.observe(outputs):
            self._replay = None
        if outputs:
            self._sink(outputs)
        self._set_timer()
        if not self._scheduler.has_work:
            self._idle.set()
        self._passed.set()

    def _step(self, pool: Pool) -> list[SequenceOutput]:
        outputs: list[SequenceOutput] = []
        for seq, reply in pool.take_replies():
            try:
                outputs += self._scheduler.commit(seq, reply)
            except ProtocolError as error:
                pool.fault("an answer does not fit the plans", error)
                break
            self._metrics.step_seconds.observe(reply.seconds)
        self._send_plans(pool)
        outputs += self._scheduler.take_outputs()
        deadline = self._scheduler.next_deadline
        if deadline is not None and deadline <= time.time():
            outputs += self._scheduler.expire(time.time())
        self._tell_of_fetches()
        tokens = sum(len(output.token_ids) for output in outputs)
        if tokens:
            self._metrics.generated_tokens.inc(tokens)
        return outputs

    def _send_plans(self, pool: Pool) -> None:
        while pool.may_send_plan and not self._held and not self._interruptions:
            begun = time.thread_time()
            plan = self._scheduler.next_plan(pool.next_seq)
            if plan is None:
                return
            spent = time.thread_time() - begun
            size = pool.send_plan(plan)
            self._metrics.plan_seconds.observe(spent)
            self._metrics.plan_bytes.observe(size)

    def _tell_of_fetches(self) -> None:
        for fetch in self._scheduler.handovers.take_begun():
            self.on_fetch(fetch)
        for fetch in self._scheduler.handovers.take_dropped():
            self.on_fetch_dropped(fetch)

    def _set_timer(self) -> None:
        """Wakes the loop at the earliest deadline of a request."""
        deadline = self._scheduler.next_deadline
        if deadline is None or deadline == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = deadline
        delay = max(deadline - time.time(), 0.0)
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        # The two clocks may differ by a little: a deadline that is not past yet is timed again.
        self._timer_at = 0.0
        self._wake.set()

    @contextlib.asynccontextmanager
    async def _publishing(self) -> AsyncIterator[None]:
        publisher = asyncio.create_task(self._publish(), name="counters")
        try:
            yield
        finally:
            publisher.cancel()
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = 0.0
            self._publish_once()

    async def _publish(self) -> None:
        while True:
            self._publish_once()
            await asyncio.sleep(COUNTER_SECONDS)

    def _publish_once(self) -> None:
        scheduler = self._scheduler
        used = scheduler.blocks_used
        self._status.set_counters(running=scheduler.running, waiting=scheduler.waiting, kv_blocks_used=used)
        metrics = self._metrics
        metrics.requests_running.set(scheduler.running)
        metrics.requests_waiting.set(scheduler.waiting)
        metrics.kv_cache_usage.set(used / scheduler.blocks_total)
        before, self._published = self._published, scheduler.counts
        metrics.prefix_queries.inc(self._published.prefix_queries - before.prefix_queries)
        metrics.prefix_hits.inc(self._published.prefix_hits - before.prefix_hits)
        metrics.preemptions.inc(self._published.preemptions - before.preemptions)
