"""Drives a Scheduler against a SimulatedRank, with the checks that must hold after everything that happens."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from support.simulated_rank import SimulatedRank, true_outputs
from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.engine.prefix_hash import extend_chain, root_hash
from tpmodel_worker.engine.requests import (
    DEADLINE_EXCEEDED,
    INTERNAL,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    RefusedError,
    Request,
    SchedulerConfig,
    SequenceOutput,
)
from tpmodel_worker.engine.scheduler import Scheduler

VOCABULARY = 9
"""Small, so that sequences stop early and share what they output."""
ABORTED = 10


def small_config(
    *,
    num_blocks: int = 50,
    block_size: int = 4,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 32,
    max_model_len: int = 100,
    queue_limit: int = 10,
    prefix_cache: bool = True,
    share_blocks: bool = True,
    max_steps: int = 8,
    state_snapshots: int = 0,
    snapshot_interval_blocks: int = 1,
) -> SchedulerConfig:
    """A configuration for a test that minds some of it."""
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        queue_limit=queue_limit,
        prefix_cache=prefix_cache,
        share_blocks=share_blocks,
        max_steps=max_steps,
        state_snapshots=state_snapshots,
        snapshot_interval_blocks=snapshot_interval_blocks,
    )


def small_request(
    key: Hashable,
    prompt: Sequence[int] | int,
    *,
    max_tokens: int = 10,
    stops: Sequence[int] = (),
    n: int = 1,
    sample_index: int = 0,
    priority: int = 0,
    deadline: float | None = None,
    resume: Sequence[int] = (),
    logprobs: int = -1,
) -> Request:
    """A request that never stops early unless it has stops; a prompt given by its length is nobody else's."""
    if isinstance(prompt, int):
        prompt = [1000 * (crc32(str(key).encode()) % 1000) + position for position in range(prompt)]
    sampling = worker_pb2.SlotSampling(
        max_tokens=max_tokens, stop_token_ids=stops, sample_index=sample_index, logprobs=logprobs
    )
    return Request(
        key=key,
        request_id=str(key),
        prompt_token_ids=prompt,
        resume_token_ids=resume,
        sampling=sampling,
        n=n,
        priority=priority,
        deadline=deadline,
    )


@dataclass(slots=True)
class ExpectedSample:
    """What one sample must bring, and what it brought."""

    outputs: list[int]
    """From the first on, the resumed ones included."""
    received: list[int]
    open: bool = True
    in_world: int = 0
    """Tokens that the present world brought."""


@dataclass(slots=True)
class ExpectedRequest:
    """A submitted request."""

    request: Request
    samples: dict[int, ExpectedSample]
    admitted: bool = False
    fruitless_worlds: int = 0
    """Lost in a row while it ran, before two tokens of any sample."""

    @property
    def open(self) -> bool:
        """Whether anything may still come for it."""
        return any(sample.open for sample in self.samples.values())


@dataclass(slots=True)
class Counts:
    """What happened, so that a test can see that it saw everything."""

    plans: int = 0
    multi_step_plans: int = 0
    release_plans: int = 0
    block_copies: int = 0
    cached_tokens: int = 0
    state_saves: int = 0
    state_restores: int = 0
    readmissions: int = 0
    """With outputs known: after a preemption or a rebuild, or of a resumed stream."""
    overrun_tokens: int = 0
    finished: int = 0
    failed: dict[int, int] = field(default_factory=dict)


class SchedulerDriver:
    """One scheduler, one simulated rank, and the replies on their way between them."""

    def __init__(self, config: SchedulerConfig, *, step_seconds: float = 0.0) -> None:
        self.config = config
        self.now = 1000.0
        self.weight_version = 3
        self.scheduler = Scheduler(config, clock=lambda: self.now, weight_version=self.weight_version)
        self.rank = _make_rank(config)
        self.expected: dict[Hashable, ExpectedRequest] = {}
        self.counts = Counts()
        self.last_plan = worker_pb2.GenerateStepRequest()
        self._step_seconds = step_seconds
        self._seq = 0
        self._replies: deque[tuple[int, worker_pb2.GenerateStepOk]] = deque()
        self._patience: float | None = None
        self._held_until: dict[Hashable, float] = {}
        """Between two worlds: when requests without a deadline of their own give up."""
        self._committed_hashes: set[bytes] = set()

    # ------------------------------------------------------------------------------ what can happen

    def submit(self, request: Request) -> bool:
        """False: the scheduler refused it."""
        try:
            self.scheduler.submit(request)
        except RefusedError:
            return False
        resolved = worker_pb2.SlotSampling()
        resolved.CopyFrom(request.sampling)
        room = self.config.max_model_len - len(request.prompt_token_ids)
        resolved.max_tokens = min(room, resolved.max_tokens or room)
        samples: dict[int, ExpectedSample] = {}
        for _ in range(request.n):
            outputs = true_outputs(request.prompt_token_ids, resolved, VOCABULARY)
            resumed = list(request.resume_token_ids)
            assert outputs[: len(resumed)] == resumed, "the driver was given outputs that are none"
            samples[resolved.sample_index] = ExpectedSample(outputs, resumed)
            self._note_committed(request, resumed)
            resolved.sample_index += 1
        self.expected[request.key] = ExpectedRequest(request, samples)
        if self._patience is not None:
            self._held_until[request.key] = self.now + self._patience
        self._take(self.scheduler.take_outputs())
        return True

    def cancel(self, key: Hashable, sample_index: int | None = None) -> None:
        expected = self.expected[key]
        samples = expected.samples.values() if sample_index is None else [expected.samples[sample_index]]
        assert self.scheduler.cancel(key, sample_index) == any(sample.open for sample in samples)
        for sample in samples:
            sample.open = False

    def send_plan(self) -> bool:
        """Makes a plan and lets the rank execute it; its replies wait for deliver. False: there was nothing to send."""
        plan = self.scheduler.next_plan(self._seq + 1)
        self._take(self.scheduler.take_outputs())
        if plan is None:
            return False
        self._seq += 1
        self.last_plan = plan
        if plan.steps > 1:
            assert self.scheduler.waiting == 0, "several steps while a request waits"
        for reply in self.rank.execute(plan):
            reply.seconds = self._step_seconds
            self._replies.append((self._seq, reply))
        self._count(plan)
        self.check()
        return True

    def deliver(self) -> bool:
        """Commits the next reply. False: none is on its way."""
        if not self._replies:
            return False
        seq, reply = self._replies.popleft()
        self._take(self.scheduler.commit(seq, reply), brought=len(reply.token_ids))
        return True

    def deliver_all(self) -> None:
        while self.deliver():
            pass

    def advance(self, seconds: float) -> None:
        self.now += seconds
        self._take(self.scheduler.expire())
        for key, expected in self.expected.items():
            deadline = self._deadline_of(key)
            assert not expected.open or deadline is None or deadline > self.now

    def _deadline_of(self, key: Hashable) -> float | None:
        own = self.expected[key].request.deadline
        return own if own is not None else self._held_until.get(key)

    def lose_world(self, patience: float) -> None:
        """The world is lost, with all replies on their way; nothing is planned until rebuild."""
        self._replies.clear()
        suspects = self._running_suspects()
        for expected in self._running():
            fruitful = max(sample.in_world for sample in expected.samples.values()) >= 2
            expected.fruitless_worlds = 0 if fruitful else expected.fruitless_worlds + 1
        held = self.scheduler.hold(patience)
        self._take(self.scheduler.take_outputs())
        failed = [str(expected.request.key) for expected in self.expected.values() if expected.fruitless_worlds == 3]
        assert held.blamed == failed == [str(expected.request.key) for expected in suspects if not expected.open]
        for expected in self.expected.values():
            expected.fruitless_worlds %= 3
        assert set(held.replayed) == {key for key in self.open_keys if self.expected[key].admitted}
        self._held_until = dict.fromkeys(self.open_keys, self.now + patience)
        self._patience = patience
        assert self.scheduler.next_plan(self._seq + 1) is None
        assert self.scheduler.running == self.scheduler.blocks_used == 0
        self.check_queue()

    def rebuild(self, num_blocks: int) -> None:
        """The world is lost, with all replies on their way, or was before; another takes its place."""
        self._held_until, self._patience = {}, None
        for expected in self.expected.values():
            for sample in expected.samples.values():
                sample.in_world = 0
        self.config = dataclasses.replace(self.config, num_blocks=num_blocks)
        self._replies.clear()
        self._seq = 0
        self.rank = _make_rank(self.config)
        self.scheduler.rebuild(self.config)
        self.check()

    def adopt_weights(self, version: int) -> None:
        """Other weights are in place, and the rank's cache is empty; all plans have been answered."""
        assert not self._replies
        self.weight_version = version
        self.rank = _make_rank(self.config)
        self.scheduler.adopt_weights(version)
        self.check()

    def fail_all(self) -> None:
        self._take(self.scheduler.fail_all(ABORTED, "aborted"))
        assert not any(expected.open for expected in self.expected.values())

    def finish(self) -> None:
        """Lets everything run to its end, and checks that nothing is left."""
        while self.scheduler.has_work or self._replies:
            progress = self.send_plan() if self.scheduler.outstanding_plans < 2 else False
            progress = self.deliver() or progress
            assert progress or not self.scheduler.has_work, "nothing can go on, though there is work"
        assert not any(expected.open for expected in self.expected.values())
        assert self.scheduler.running == self.scheduler.waiting == self.scheduler.slots_used == 0
        assert self.scheduler.blocks_used == 0, "a block leaked"
        assert self.scheduler.outstanding_plans == 0
        assert not self.rank.slots, "a slot leaked"

    @property
    def outstanding_plans(self) -> int:
        return self.scheduler.outstanding_plans

    @property
    def open_keys(self) -> list[Hashable]:
        return [key for key, expected in self.expected.items() if expected.open]

    def outputs_of(self, key: Hashable, sample_index: int = 0) -> list[int]:
        """What a sample brought so far, the resumed outputs included."""
        return self.expected[key].samples[sample_index].received

    # ------------------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """Scheduler and rank agree on slots and blocks; only committed tokens can be found."""
        placement = self.scheduler._placement
        pool = placement.pool
        if not placement.releases_pending:
            ours = {slot: sequence for slot, sequence in enumerate(placement.slots) if sequence is not None}
            assert ours.keys() == self.rank.slots.keys()
            held = self.rank.blocks_held()
            for slot, sequence in ours.items():
                theirs = self.rank.slots[slot]
                assert sequence.blocks == theirs.table
                # The rank knows more: what it sampled, while replies are on their way.
                assert theirs.tokens[: len(sequence.token_ids)] == sequence.token_ids
                assert sequence.computed_length >= theirs.computed_length
            for block in range(pool.num_blocks):
                assert pool.references(block) == held[block], f"block {block} is counted wrongly"
            assert pool.used == len(held)
        for block in range(pool.num_blocks):
            block_hash = pool.hash_of(block)
            assert block_hash is None or block_hash in self._committed_hashes, f"block {block} has uncommitted ids"
            assert block_hash is None or self.config.prefix_cache
        assert self.scheduler.blocks_used == pool.used <= self.scheduler.blocks_total
        assert len(self._running_suspects()) <= 1, "suspects run together"
        self.check_queue()

    def _running(self) -> list[ExpectedRequest]:
        """Requests that hold a slot."""
        keys = {sequence.state.request.key for sequence in self.scheduler._placement.running()}
        return [expected for key, expected in self.expected.items() if key in keys]

    def _running_suspects(self) -> list[ExpectedRequest]:
        return [expected for expected in self._running() if expected.fruitless_worlds == 2]

    def check_queue(self) -> None:
        """Every live request is somewhere, once."""
        open_requests = sum(expected.open for expected in self.expected.values())
        assert self.scheduler.running + self.scheduler.waiting == open_requests

    def _take(self, outputs: Sequence[SequenceOutput], *, brought: int = 0) -> None:
        taken = 0
        for output in outputs:
            expected = self.expected[output.key]
            sample = expected.samples[output.sample_index]
            if output.error is not None:
                self._take_error(expected, output)
                continue
            assert sample.open, "output for a sample that has ended"
            if output.admitted is not None:
                assert not expected.admitted, "admitted twice"
                assert output.admitted.weight_version == self.weight_version
                assert output.admitted.cached_tokens % self.config.block_size == 0
                expected.admitted = True
                self.counts.cached_tokens += output.admitted.cached_tokens
            assert expected.admitted, "tokens before admission"
            taken += len(output.token_ids)
            sample.received += output.token_ids
            sample.in_world += len(output.token_ids)
            if sample.in_world >= 2:
                expected.fruitless_worlds = 0
            assert sample.received == sample.outputs[: len(sample.received)], "not the true tokens"
            wanted = expected.request.sampling.logprobs >= 0
            assert [-entry.logprob for entry in output.logprobs] == (output.token_ids if wanted else [])
            self._note_committed(expected.request, sample.received)
            if output.finish_reason is not None:
                self._take_finish(expected, sample, output.finish_reason)
        self.counts.overrun_tokens += brought - taken

    def _take_finish(
        self, expected: ExpectedRequest, sample: ExpectedSample, reason: inference_pb2.FinishReason.ValueType
    ) -> None:
        assert sample.received == sample.outputs, "finished before its end"
        stopped = sample.outputs[-1] in expected.request.sampling.stop_token_ids
        assert reason == (inference_pb2.FINISH_REASON_STOP if stopped else inference_pb2.FINISH_REASON_LENGTH)
        sample.open = False
        self.counts.finished += 1

    def _take_error(self, expected: ExpectedRequest, output: SequenceOutput) -> None:
        assert output.error is not None
        assert expected.open, "an error for a request that has ended"
        code = output.error[0]
        if code in (DEADLINE_EXCEEDED, UNAVAILABLE):
            deadline = self._deadline_of(output.key)
            assert deadline is not None
            assert deadline <= self.now
            assert (code == UNAVAILABLE) == (self._patience is not None) == (output.retry_after > 0)
        elif code == RESOURCE_EXHAUSTED:
            prompt = len(expected.request.prompt_token_ids)
            longest = max(prompt + len(sample.received) for sample in expected.samples.values() if sample.open)
            assert self.config.blocks_for(longest) > self.config.num_blocks, "failed though it fits"
        elif code == INTERNAL:
            assert expected.fruitless_worlds == 3
        else:
            assert code == ABORTED
        for sample in expected.samples.values():
            sample.open = False
        self.counts.failed[code] = self.counts.failed.get(code, 0) + 1

    def _note_committed(self, request: Request, outputs: Sequence[int]) -> None:
        token_ids = [*request.prompt_token_ids, *outputs]
        chain: list[bytes] = []
        blocks = len(token_ids) // self.config.block_size
        extend_chain(chain, root_hash(self.weight_version), token_ids, self.config.block_size, blocks)
        self._committed_hashes.update(chain)

    def _count(self, plan: worker_pb2.GenerateStepRequest) -> None:
        counts = self.counts
        counts.plans += 1
        counts.multi_step_plans += plan.steps > 1
        counts.release_plans += plan.steps == 0
        counts.block_copies += len(plan.block_copies)
        counts.state_saves += len(plan.state_saves)
        counts.state_restores += sum(admission.HasField("state_snapshot") for admission in plan.admissions)
        counts.readmissions += sum(len(admission.token_ids) > admission.prompt_length for admission in plan.admissions)


def _make_rank(config: SchedulerConfig) -> SimulatedRank:
    return SimulatedRank(
        num_blocks=config.num_blocks,
        block_size=config.block_size,
        slots=config.max_num_seqs,
        max_step_tokens=config.max_num_batched_tokens,
        max_len=config.max_model_len,
        vocabulary=VOCABULARY,
        keeps_state=not config.share_blocks,
        snapshots=config.state_snapshots,
    )
