"""The scheduler: turns requests into plans and rank 0's replies into outputs. Pure: no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.commits import Commits
from tpmodel_worker.engine.handovers import Handovers
from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.live_requests import LiveRequests
from tpmodel_worker.engine.placement import Placement
from tpmodel_worker.engine.plan_ledger import PlanLedger, PlanRecord
from tpmodel_worker.engine.planner import Draft, PlanCounts, Planner
from tpmodel_worker.engine.request_rules import check_request, reason_to_end
from tpmodel_worker.engine.requests import (
    INTERNAL,
    RESOURCE_EXHAUSTED,
    Fetch,
    Held,
    InvalidRequestError,
    QueueFullError,
    Request,
    SchedulerConfig,
    SequenceOutput,
)
from tpmodel_worker.engine.sequence import SequenceStatus, make_samples
from tpmodel_worker.engine.step_times import StepTimes
from tpmodel_worker.engine.suspects import BLAMED_AFTER, note_lost_world


class Scheduler:
    """Decides what every rank computes next.

    The engine calls `next_plan` whenever fewer than two plans are outstanding, sends what it returns to
    every rank, and hands rank 0's replies to `commit`, in order. Outputs come back from `commit`,
    `expire`, `fail_all` and `take_outputs`, each of which also returns what planning or submitting left
    (admissions, failures): call `take_outputs` after `submit` and `next_plan`.

    A sequence that has ended, by a reply, a cancel or a failure, gives its slot and blocks back at once;
    the next plan says so to the ranks (as releases), and may give both to others. Tokens that plans sent
    before still bring for it are dropped.
    """

    def __init__(self, config: SchedulerConfig, *, clock: Callable[[], float], weight_version: int) -> None:
        """clock: unix seconds, as deadlines are. weight_version salts the prefix cache."""
        self._config = config
        self._clock = clock
        self._weight_version = weight_version
        self._step_times = StepTimes()
        self._counts = PlanCounts()
        self._arrivals = 0
        self._ledger = PlanLedger()
        self._placement = Placement(config, weight_version=weight_version)
        self._handovers = Handovers(self._placement, weight_version=weight_version)
        self._planner = Planner(self._placement, self._step_times, self._counts)
        self._live = LiveRequests(self._placement, self._handovers)
        self._commits = Commits(self._ledger, self._live, self._step_times, clock)

    # ------------------------------------------------------------------------------ requests in

    def submit(self, request: Request) -> None:
        """Takes a request, to be planned by priority, then arrival.

        A resumed stream that was at its end (its last id stops it, or max_tokens are out) ends at once,
        in `take_outputs`. Raises RefusedError, whose `code` is the google.rpc.Code: QueueFullError,
        RequestTooLongError, NeverFitsError, InvalidRequestError.
        """
        if request.key in self._live:
            raise InvalidRequestError(f"a request with key {request.key!r} is live already")
        check_request(request, self._config)
        waiting, limit = self._live.never_admitted, self._config.queue_limit
        if waiting >= limit:
            raise QueueFullError(f"{waiting} requests wait already, the limit is {limit}")
        self._arrivals += 1
        state = make_samples(request, arrival=self._arrivals, max_model_len=self._config.max_model_len)
        reason = reason_to_end(state)
        if reason is None:
            self._live.add(state, self._clock())
            return
        self._live.tell_admitted(state.samples[0], cached_tokens=0, weight_version=self._weight_version)
        for sample in state.samples:
            self._live.tell(SequenceOutput(request.key, sample.sample_index, finish_reason=reason))

    def cancel(self, key: Hashable, sample_index: int | None = None) -> bool:
        """Ends a request, or one sample of it (absolute index), without output. False: it was not live.

        What it held is free for the next plan made, which tells the ranks.
        """
        return self._live.cancel(key, sample_index)

    # ------------------------------------------------------------------------ plans and replies

    def next_plan(self, seq: int) -> worker_pb2.GenerateStepRequest | None:
        """The next plan, which must be sent as `seq`; None while nothing can run (before more replies, or at all).

        A plan that only releases slots has steps = 0 and ack_now: rank 0's answer goes to commit too.
        """
        if self._live.patience is not None:
            return None
        self._live.expire(self._clock())
        draft = self._make_draft()
        while draft.does_not_fit and draft.is_empty:
            # Those that were given up held everything up; without them others may run.
            draft = self._make_draft()
        if draft.is_empty:
            return None
        self._ledger.add(
            seq,
            PlanRecord(
                number=draft.number,
                steps=draft.message.steps,
                sampling=draft.sampling,
                decodes_only=draft.decodes_only,
            ),
        )
        return draft.message

    def _make_draft(self) -> Draft:
        draft = self._planner.make(number=self._ledger.next_number, last_done=self._ledger.last_done)
        for sequence, cached_tokens in draft.admitted:
            self._live.never_admitted -= 1
            self._live.tell_admitted(sequence, cached_tokens=cached_tokens, weight_version=self._weight_version)
        for sequence in draft.receiving:
            self._handovers.begin_fetch(sequence)
        for state, message in draft.does_not_fit:
            if state.live_samples:
                self._live.fail(state, RESOURCE_EXHAUSTED, message)
        return draft

    def commit(self, seq: int, reply: worker_pb2.GenerateStepOk) -> list[SequenceOutput]:
        """Takes rank 0's reply for one step; the last step's (or a steps = 0 plan's only one) ends the plan.

        Raises ProtocolError when the reply does not fit the plan: a fault of the world.
        """
        self._commits.read(seq, reply)
        return self.take_outputs()

    def take_outputs(self) -> list[SequenceOutput]:
        """Outputs that submit and next_plan left: admissions, failures, resumed streams that were at their end."""
        return self._live.take_outputs()

    def expire(self, now: float | None = None) -> list[SequenceOutput]:
        """Fails every request whose deadline has passed: with DEADLINE_EXCEEDED, between two worlds with UNAVAILABLE.

        now: unix seconds, else the clock's.
        """
        self._live.expire(self._clock() if now is None else now)
        return self.take_outputs()

    def fail_all(self, code: int, message: str) -> list[SequenceOutput]:
        """Fails every live request. code: google.rpc.Code."""
        for state in self._live.states():
            self._live.fail(state, code, message)
        return self.take_outputs()

    # ------------------------------------------------------------------------- between two gangs

    @property
    def handovers(self) -> Handovers:
        """Of the present world."""
        return self._handovers

    def end_handover(self, kept: Kept, *, fetched: bool) -> None:
        """Nobody reads what was kept any more. fetched: it is free; else it stays until it expires."""
        self._live.note_deadline(self._handovers.end(kept, self._clock(), fetched=fetched))

    def fetched(self, fetch: Fetch) -> None:
        """Its KV has come: the request goes on behind it."""
        sequence = self._handovers.end_fetch(fetch)
        if sequence is None:
            return
        if sequence.status is SequenceStatus.RECEIVING:
            self._placement.received(sequence)
        else:
            self._placement.stop_receiving(sequence)

    def fetch_failed(self, fetch: Fetch, code: int, message: str) -> None:
        """Nothing comes into its blocks any more: they are free, and the request fails. code: google.rpc.Code."""
        sequence = self._handovers.end_fetch(fetch)
        if sequence is None:
            return
        if sequence.status is SequenceStatus.RECEIVING:
            self._live.fail(sequence.state, code, message)
        self._placement.stop_receiving(sequence)

    # ------------------------------------------------------------------------ between two worlds

    def hold(self, patience: float, *, blame: bool = True) -> Held:
        """The world is lost: nothing is planned until `rebuild`, and everything waits.

        Those that had been admitted will be replayed, but for requests that may be why worlds are lost: they fail.

        Args:
            patience: seconds that a request without a deadline of its own waits. Requests that come meanwhile are
                queued as always.
            blame: whether a request may be why this world was lost.
        """
        self._live.patience = patience
        blamed = note_lost_world(self._live.states()) if blame else []
        for state in blamed:
            message = (
                f"{BLAMED_AFTER} worlds in a row were lost while they computed this request, the last one with no "
                "other request that could be the reason: it is not tried again"
            )
            self._live.fail(state, INTERNAL, message)
        self._requeue_everything(self._config)
        self._live.hold_until(self._clock() + patience)
        replayed = [state.request.key for state in self._live.states() if state.admitted]
        return Held(replayed, [state.request.request_id for state in blamed])

    def rebuild(self, config: SchedulerConfig) -> None:
        """A new epoch: outstanding plans are forgotten, KV and prefix cache start empty.

        What ran goes back to the queue, where its arrival puts it before what has waited, and is
        recomputed from its prompt and committed tokens. Plans made from now on may count seq from 1.
        """
        self._live.patience = None
        self._requeue_everything(config)
        self._live.hold_until(None)

    def _requeue_everything(self, config: SchedulerConfig) -> None:
        self._ledger.forget()
        self._config = config
        self._placement = Placement(config, weight_version=self._weight_version)
        self._handovers = Handovers(self._placement, weight_version=self._weight_version)
        self._planner = Planner(self._placement, self._step_times, self._counts)
        self._live.requeue(self._placement, self._handovers)

    # --------------------------------------------------------------------------- weight updates

    @property
    def weight_version(self) -> int:
        """Of the weights that plans are made for."""
        return self._weight_version

    def close_admission(self) -> int:
        """Requests that come from now on wait until open_admission; the number of the last one before."""
        self._placement.last_arrival = self._arrivals
        return self._arrivals

    def open_admission(self) -> None:
        """All requests may be admitted again."""
        self._placement.last_arrival = None

    def has_work_before(self, arrival: int) -> bool:
        """Whether a request up to that number is live."""
        return any(state.arrival <= arrival for state in self._live.states())

    def adopt_weights(self, version: int) -> list[Hashable]:
        """Other weights are in place, and the ranks' slots are empty: KV of the old ones is never used again.

        Needs all plans answered. Live requests go on behind their committed tokens, as after rebuild; those that
        had begun are said to be at the new version from here on. Returns their keys.
        """
        self._weight_version = version
        self.rebuild(self._config)
        for state in self._live.states():
            if state.admitted:
                self._live.tell_admitted(state.samples[0], cached_tokens=0, weight_version=version)
        return [state.request.key for state in self._live.states() if state.admitted]

    # ----------------------------------------------------------------------------------- metrics

    @property
    def running(self) -> int:
        """Requests of which a sample holds a slot."""
        return self._placement.running_requests

    @property
    def waiting(self) -> int:
        """Live requests of which no sample holds a slot."""
        return len(self._live) - self._placement.running_requests

    @property
    def slots_used(self) -> int:
        """Sequences that hold a slot."""
        return self._placement.slots_used

    @property
    def blocks_used(self) -> int:
        """Blocks that running sequences hold (cached ones that nobody holds count as free)."""
        return self._placement.pool.used

    @property
    def blocks_total(self) -> int:
        """Blocks of the KV cache."""
        return self._placement.pool.num_blocks

    @property
    def outstanding_plans(self) -> int:
        """Plans made whose last reply has not come."""
        return len(self._ledger)

    @property
    def counts(self) -> PlanCounts:
        """Prefix cache and preemptions, over all epochs. A copy."""
        return replace(self._counts)

    @property
    def next_deadline(self) -> float | None:
        """Unix seconds before which no live request's deadline passes; None: none has one."""
        return self._live.next_deadline

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a release is still to be sent; next_plan may yet be waiting for replies."""
        return bool(len(self._live)) or self._placement.releases_pending
