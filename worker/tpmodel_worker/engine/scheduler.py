"""The scheduler: turns requests into plans and rank 0's replies into outputs. Pure: no I/O, no clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace

from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.engine.handovers import Handovers
from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.placement import Placement
from tpmodel_worker.engine.plan_ledger import PlanLedger, PlanRecord
from tpmodel_worker.engine.planner import Draft, PlanCounts, Planner
from tpmodel_worker.engine.requests import (
    DEADLINE_EXCEEDED,
    INTERNAL,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    Admitted,
    Fetch,
    Held,
    InvalidRequestError,
    NeverFitsError,
    ProtocolError,
    QueueFullError,
    RefusedError,
    Request,
    RequestTooLongError,
    SchedulerConfig,
    SequenceOutput,
)
from tpmodel_worker.engine.sequence import RequestState, Sequence, SequenceStatus, make_samples
from tpmodel_worker.engine.step_times import StepTimes
from tpmodel_worker.engine.suspects import BLAMED_AFTER, is_suspect, note_lost_world, note_token

__all__ = [
    "Admitted",
    "InvalidRequestError",
    "NeverFitsError",
    "ProtocolError",
    "QueueFullError",
    "RefusedError",
    "Request",
    "RequestTooLongError",
    "Scheduler",
    "SchedulerConfig",
    "SequenceOutput",
]


RETRY_AFTER_SECONDS = 5.0
"""The hint to whoever waited for a rebuild in vain."""

_FINISH_REASONS: dict[int, inference_pb2.FinishReason.ValueType] = {
    worker_pb2.FINISHED_STOP: inference_pb2.FINISH_REASON_STOP,
    worker_pb2.FINISHED_LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


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
        self._placement = Placement(config, weight_version=weight_version)
        self._handovers = Handovers(self._placement, weight_version=weight_version)
        self._counts = PlanCounts()
        self._planner = Planner(self._placement, self._step_times, self._counts)
        self._ledger = PlanLedger()
        self._requests: dict[Hashable, RequestState] = {}
        self._arrivals = 0
        self._never_admitted = 0
        self._next_deadline: float | None = None
        self._patience: float | None = None
        self._outputs: list[SequenceOutput] = []

    # ------------------------------------------------------------------------------ requests in

    def submit(self, request: Request) -> None:
        """Takes a request, to be planned by priority, then arrival.

        A resumed stream that was at its end (its last id stops it, or max_tokens are out) ends at once,
        in `take_outputs`. Raises RefusedError, whose `code` is the google.rpc.Code: QueueFullError,
        RequestTooLongError, NeverFitsError, InvalidRequestError.
        """
        self._check(request)
        self._arrivals += 1
        state = make_samples(request, arrival=self._arrivals, max_model_len=self._config.max_model_len)
        reason = _reason_to_end(state)
        if reason is not None:
            self._outputs.append(self._admitted_output(state.samples[0], cached_tokens=0))
            for sample in state.samples:
                self._outputs.append(SequenceOutput(request.key, sample.sample_index, finish_reason=reason))
            return
        self._requests[request.key] = state
        self._never_admitted += 1
        for sample in state.samples:
            self._placement.enqueue(sample)
        if self._patience is not None:
            state.held_until = self._clock() + self._patience
        self._note_deadline(_deadline_of(state))

    def _check(self, request: Request) -> None:
        config = self._config
        prompt_length = len(request.prompt_token_ids)
        known_length = prompt_length + len(request.resume_token_ids)
        if request.key in self._requests:
            raise InvalidRequestError(f"a request with key {request.key!r} is live already")
        if prompt_length == 0:
            raise InvalidRequestError("the prompt has no tokens")
        if request.n < 1:
            raise InvalidRequestError(f"n must be at least 1, not {request.n}")
        if prompt_length >= config.max_model_len:
            raise RequestTooLongError(
                f"the prompt has {prompt_length} tokens, but the context is {config.max_model_len} tokens, "
                "of which at least one must be left for output"
            )
        if config.blocks_for(known_length) > config.num_blocks:
            raise NeverFitsError(
                f"{known_length} tokens need {config.blocks_for(known_length)} blocks of {config.block_size} tokens, "
                f"but the KV cache has {config.num_blocks}"
            )
        if request.n > 1 and (request.keep_kv or request.kv_source):
            raise InvalidRequestError(f"n is {request.n}: what is handed over has one sample")
        if request.kv_source is not None and not request.resume_token_ids:
            raise InvalidRequestError("kv_source without resume_token_ids: the tokens that the other gang has sent")
        if self._never_admitted >= config.queue_limit:
            raise QueueFullError(f"{self._never_admitted} requests wait already, the limit is {config.queue_limit}")

    def cancel(self, key: Hashable, sample_index: int | None = None) -> bool:
        """Ends a request, or one sample of it (absolute index), without output. False: it was not live.

        What it held is free for the next plan made, which tells the ranks.
        """
        state = self._requests.get(key)
        if state is None:
            return False
        if sample_index is None:
            self._end_request(state)
            return True
        for sample in state.samples:
            if sample.sample_index == sample_index and sample.status is not SequenceStatus.ENDED:
                self._end_sample(sample)
                return True
        return False

    # ------------------------------------------------------------------------------------ plans

    def next_plan(self, seq: int) -> worker_pb2.GenerateStepRequest | None:
        """The next plan, which must be sent as `seq`; None while nothing can run (before more replies, or at all).

        A plan that only releases slots has steps = 0 and ack_now: rank 0's answer goes to commit too.
        """
        if self._patience is not None:
            return None
        self._expire(self._clock())
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
            self._never_admitted -= 1
            self._outputs.append(self._admitted_output(sequence, cached_tokens))
        for sequence in draft.receiving:
            self._handovers.begin_fetch(sequence)
        for state, message in draft.does_not_fit:
            if state.live_samples:
                self._fail(state, RESOURCE_EXHAUSTED, message)
        return draft

    def _admitted_output(self, sequence: Sequence, cached_tokens: int) -> SequenceOutput:
        admitted = Admitted(cached_tokens=cached_tokens, weight_version=self._weight_version)
        return SequenceOutput(sequence.state.request.key, sequence.sample_index, admitted=admitted)

    def commit(self, seq: int, reply: worker_pb2.GenerateStepOk) -> list[SequenceOutput]:
        """Takes rank 0's reply for one step; the last step's (or a steps = 0 plan's only one) ends the plan.

        Raises ProtocolError when the reply does not fit the plan: a fault of the world.
        """
        plan = self._ledger.advance(seq, reply.step)
        slots, token_ids, reasons, logprobs = reply.slots, reply.token_ids, reply.finished, reply.logprobs
        if not len(slots) == len(token_ids) == len(reasons) == plan.expected_replies:
            raise ProtocolError(
                f"plan {seq}, step {reply.step}: {len(slots)} slots, {len(token_ids)} tokens and {len(reasons)} "
                f"finish flags, expected {plan.expected_replies} of each"
            )
        if logprobs and len(logprobs) != len(slots):
            raise ProtocolError(f"plan {seq}, step {reply.step}: {len(logprobs)} logprobs for {len(slots)} tokens")
        if plan.decodes_only and plan.sampling:
            self._step_times.record(len(plan.sampling), reply.seconds)
        sampling = plan.sampling
        for index, (slot, token_id, finished) in enumerate(zip(slots, token_ids, reasons, strict=True)):
            sequence = sampling.get(slot)
            if sequence is None or sequence.finished:
                raise ProtocolError(f"plan {seq}, step {reply.step}: slot {slot} has nothing to sample")
            if finished:
                sequence.finished = True
                plan.expected_replies -= 1
            if sequence.status is not SequenceStatus.ENDED:
                self._commit_token(sequence, token_id, finished, logprobs[index] if logprobs else None)
        return self.take_outputs()

    def _commit_token(
        self, sequence: Sequence, token_id: int, finished: int, logprobs: worker_pb2.TokenLogprobs | None
    ) -> None:
        sequence.token_ids.append(token_id)
        note_token(sequence)
        length = len(sequence.token_ids)
        if length >= sequence.length_limit and not finished:
            raise ProtocolError(f"sample {sequence.sample_index} reached its {length} tokens and goes on")
        output = SequenceOutput(sequence.state.request.key, sequence.sample_index, [token_id])
        if logprobs is not None and sequence.sampling.logprobs >= 0:
            output.logprobs.append(logprobs)
        self._outputs.append(output)
        if sequence.status is SequenceStatus.RUNNING:
            # The KV of a token is written by the step after the one that sampled it, if there is one.
            self._placement.cache_prefix(sequence, length - 1)
        if finished:
            output.finish_reason = _FINISH_REASONS[finished]
            if sequence.keeps and finished == worker_pb2.FINISHED_LENGTH:
                output.finish_reason = inference_pb2.FINISH_REASON_KEPT
                self._keep(sequence)
            else:
                self._end_sample(sequence)

    def take_outputs(self) -> list[SequenceOutput]:
        """Outputs that submit and next_plan left: admissions, failures, resumed streams that were at their end."""
        outputs = self._outputs
        self._outputs = []
        return outputs

    # ------------------------------------------------------------------------------------- ends

    def expire(self, now: float | None = None) -> list[SequenceOutput]:
        """Fails every request whose deadline has passed: with DEADLINE_EXCEEDED, between two worlds with UNAVAILABLE.

        now: unix seconds, else the clock's.
        """
        self._expire(self._clock() if now is None else now)
        return self.take_outputs()

    def _expire(self, now: float) -> None:
        if self._next_deadline is None or now < self._next_deadline:
            return
        self._next_deadline = None
        for kept in self._placement.kept.expired(now):
            self._placement.drop(kept)
        self._note_deadline(self._placement.kept.next_expiry())
        for state in list(self._requests.values()):
            deadline = _deadline_of(state)
            if deadline is None or deadline > now:
                self._note_deadline(deadline)
            elif self._patience is None:
                self._fail(state, DEADLINE_EXCEEDED, "the request's deadline has passed")
            else:
                message = "the gang is rebuilding its world, and the request's time to wait for that is over"
                self._fail(state, UNAVAILABLE, message, retry_after=RETRY_AFTER_SECONDS)

    def _note_deadline(self, deadline: float | None) -> None:
        if deadline is not None and (self._next_deadline is None or deadline < self._next_deadline):
            self._next_deadline = deadline

    def fail_all(self, code: int, message: str) -> list[SequenceOutput]:
        """Fails every live request. code: google.rpc.Code."""
        for state in list(self._requests.values()):
            self._fail(state, code, message)
        return self.take_outputs()

    def _fail(self, state: RequestState, code: int, message: str, *, retry_after: float = 0.0) -> None:
        self._end_request(state)
        first = state.samples[0].sample_index
        output = SequenceOutput(state.request.key, first, error=(code, message), retry_after=retry_after)
        self._outputs.append(output)

    def _end_request(self, state: RequestState) -> None:
        for sample in state.samples:
            if sample.status is not SequenceStatus.ENDED:
                self._end_sample(sample)

    def _end_sample(self, sample: Sequence) -> None:
        self._placement.end(sample)
        self._handovers.request_ended(sample)
        self._forget_ended(sample.state)

    def _forget_ended(self, state: RequestState) -> None:
        if state.live_samples == 0:
            del self._requests[state.request.key]
            self._never_admitted -= not state.admitted

    # ---------------------------------------------------------------------- between two gangs

    def _keep(self, sequence: Sequence) -> None:
        """The sequence ends, and what it holds stays, unless it was preempted meanwhile and holds nothing."""
        keep = sequence.state.request.keep_kv
        if keep is None or sequence.status is not SequenceStatus.RUNNING:
            self._end_sample(sequence)
            return
        self._placement.keep(sequence, ticket=keep.ticket, expires=self._clock() + keep.seconds)
        self._note_deadline(self._placement.kept.next_expiry())
        self._forget_ended(sequence.state)

    @property
    def handovers(self) -> Handovers:
        """Of the present world."""
        return self._handovers

    def end_handover(self, kept: Kept, *, fetched: bool) -> None:
        """Nobody reads what was kept any more. fetched: it is free; else it stays until it expires."""
        self._note_deadline(self._handovers.end(kept, self._clock(), fetched=fetched))

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
            self._fail(sequence.state, code, message)
        self._placement.stop_receiving(sequence)

    # --------------------------------------------------------------------------- between two worlds

    def hold(self, patience: float, *, blame: bool = True) -> Held:
        """The world is lost: nothing is planned until `rebuild`, and everything waits.

        Those that had been admitted will be replayed, but for requests that may be why worlds are lost: they fail.

        Args:
            patience: seconds that a request without a deadline of its own waits. Requests that come meanwhile are
                queued as always.
            blame: whether a request may be why this world was lost.
        """
        self._patience = patience
        blamed = note_lost_world(self._requests.values()) if blame else []
        for state in blamed:
            message = (
                f"{BLAMED_AFTER} worlds in a row were lost while they computed this request, the last one with no "
                "other request that could be the reason: it is not tried again"
            )
            self._fail(state, INTERNAL, message)
        self._requeue_everything(self._config)
        self._next_deadline = None
        for state in self._requests.values():
            state.held_until = self._clock() + patience
            self._note_deadline(_deadline_of(state))
        replayed = [key for key, state in self._requests.items() if state.admitted]
        return Held(replayed, [state.request.request_id for state in blamed])

    def rebuild(self, config: SchedulerConfig) -> None:
        """A new epoch: outstanding plans are forgotten, KV and prefix cache start empty.

        What ran goes back to the queue, where its arrival puts it before what has waited, and is
        recomputed from its prompt and committed tokens. Plans made from now on may count seq from 1.
        """
        self._patience = None
        self._requeue_everything(config)
        self._next_deadline = None
        for state in self._requests.values():
            state.held_until = None
            self._note_deadline(state.request.deadline)

    def _requeue_everything(self, config: SchedulerConfig) -> None:
        self._ledger.forget()
        self._config = config
        self._placement = Placement(config, weight_version=self._weight_version)
        self._handovers = Handovers(self._placement, weight_version=self._weight_version)
        self._planner = Planner(self._placement, self._step_times, self._counts)
        for state in self._requests.values():
            state.samples_in_slots = 0
            for sample in state.samples:
                if sample.status is not SequenceStatus.ENDED:
                    sample.forget_world()
                    self._placement.enqueue(sample)
        self._placement.trials = any(is_suspect(state) for state in self._requests.values())

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
        return any(state.arrival <= arrival for state in self._requests.values())

    def adopt_weights(self, version: int) -> None:
        """Other weights are in place, and the ranks' slots are empty: KV of the old ones is never used again.

        Needs all plans answered. Live requests go on behind their committed tokens, as after rebuild; those that
        had begun are said to be at the new version from here on.
        """
        self._weight_version = version
        self.rebuild(self._config)
        for state in self._requests.values():
            if state.admitted:
                self._outputs.append(self._admitted_output(state.samples[0], cached_tokens=0))

    # ----------------------------------------------------------------------------------- metrics

    @property
    def running(self) -> int:
        """Requests of which a sample holds a slot."""
        return self._placement.running_requests

    @property
    def waiting(self) -> int:
        """Live requests of which no sample holds a slot."""
        return len(self._requests) - self._placement.running_requests

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
        return self._next_deadline

    @property
    def has_work(self) -> bool:
        """Whether a request is live or a release is still to be sent; next_plan may yet be waiting for replies."""
        return bool(self._requests) or self._placement.releases_pending


def _deadline_of(state: RequestState) -> float | None:
    """Unix seconds: its own, else the one that a rebuild gave it."""
    return state.request.deadline if state.request.deadline is not None else state.held_until


def _reason_to_end(state: RequestState) -> inference_pb2.FinishReason.ValueType | None:
    """Why there is nothing to generate: the resumed outputs are a whole answer already."""
    resumed = state.request.resume_token_ids
    sampling = state.samples[0].sampling
    if resumed and resumed[-1] in sampling.stop_token_ids and len(resumed) >= sampling.min_tokens:
        return inference_pb2.FINISH_REASON_STOP
    if len(resumed) >= sampling.max_tokens:
        return inference_pb2.FINISH_REASON_LENGTH
    return None
