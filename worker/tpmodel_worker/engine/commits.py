"""Rank 0's replies: which tokens they commit to which sequence, and which sequences they end."""

from __future__ import annotations

from collections.abc import Callable

from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.engine.live_requests import LiveRequests
from tpmodel_worker.engine.plan_ledger import PlanLedger, PlanRecord
from tpmodel_worker.engine.requests import ProtocolError, SequenceOutput
from tpmodel_worker.engine.sequence import Sequence, SequenceStatus
from tpmodel_worker.engine.step_times import StepTimes
from tpmodel_worker.engine.suspects import note_token

_FINISH_REASONS: dict[int, inference_pb2.FinishReason.ValueType] = {
    worker_pb2.FINISHED_STOP: inference_pb2.FINISH_REASON_STOP,
    worker_pb2.FINISHED_LENGTH: inference_pb2.FINISH_REASON_LENGTH,
}


class Commits:
    """Reads the replies to the ledger's plans, in order. What follows from them is left with the live requests."""

    def __init__(
        self, ledger: PlanLedger, live: LiveRequests, step_times: StepTimes, clock: Callable[[], float]
    ) -> None:
        """clock: unix seconds."""
        self._ledger = ledger
        self._live = live
        self._step_times = step_times
        self._clock = clock

    def read(self, seq: int, reply: worker_pb2.GenerateStepOk) -> None:
        """Takes the reply for one step. Raises ProtocolError when it does not fit the plan."""
        plan = self._ledger.advance(seq, reply.step)
        _check_lengths(seq, plan, reply)
        logprobs = reply.logprobs
        if plan.decodes_only and plan.sampling:
            self._step_times.record(len(plan.sampling), reply.seconds)
        sampling = plan.sampling
        tokens = zip(reply.slots, reply.token_ids, reply.finished, strict=True)
        for index, (slot, token_id, finished) in enumerate(tokens):
            sequence = sampling.get(slot)
            if sequence is None or sequence.finished:
                raise ProtocolError(f"plan {seq}, step {reply.step}: slot {slot} has nothing to sample")
            if finished:
                sequence.finished = True
                plan.expected_replies -= 1
            if sequence.status is not SequenceStatus.ENDED:
                self._commit(sequence, token_id, finished, logprobs[index] if logprobs else None)

    def _commit(
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
        self._live.tell(output)
        if sequence.status is SequenceStatus.RUNNING:
            # The KV of a token is written by the step after the one that sampled it, if there is one.
            self._live.placement.cache_prefix(sequence, length - 1)
        if finished:
            output.finish_reason = _FINISH_REASONS[finished]
            if sequence.keeps and finished == worker_pb2.FINISHED_LENGTH:
                output.finish_reason = inference_pb2.FINISH_REASON_KEPT
                self._keep(sequence)
            else:
                self._live.end_sample(sequence)

    def _keep(self, sequence: Sequence) -> None:
        """The sequence ends, and what it holds stays, unless it was preempted meanwhile and holds nothing."""
        keep = sequence.state.request.keep_kv
        if keep is None or sequence.status is not SequenceStatus.RUNNING:
            self._live.end_sample(sequence)
            return
        placement = self._live.placement
        placement.keep(sequence, ticket=keep.ticket, expires=self._clock() + keep.seconds)
        self._live.note_deadline(placement.kept.next_expiry())
        self._live.forget_ended(sequence.state)


def _check_lengths(seq: int, plan: PlanRecord, reply: worker_pb2.GenerateStepOk) -> None:
    slots, tokens, reasons = len(reply.slots), len(reply.token_ids), len(reply.finished)
    if not slots == tokens == reasons == plan.expected_replies:
        raise ProtocolError(
            f"plan {seq}, step {reply.step}: {slots} slots, {tokens} tokens and {reasons} "
            f"finish flags, expected {plan.expected_replies} of each"
        )
    if reply.logprobs and len(reply.logprobs) != slots:
        raise ProtocolError(f"plan {seq}, step {reply.step}: {len(reply.logprobs)} logprobs for {slots} tokens")
