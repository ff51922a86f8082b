"""Makes one plan: who computes what next, and with which blocks."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.placement import Placement, Prefix
from tpmodel_worker.engine.sequence import RequestState, Sequence, SequenceStatus
from tpmodel_worker.engine.step_times import StepTimes


class _Verdict(enum.Enum):
    """What became of a waiting sequence."""

    ADMITTED = enum.auto()
    LATER = enum.auto()
    """Not in this plan, for a reason that holds nobody else up."""
    BLOCKED = enum.auto()
    """It lacks a slot, blocks or replies: nobody behind it may go first."""


@dataclass(slots=True)
class Draft:
    """A plan in the making, and what comes of making it."""

    number: int
    last_done: int
    """Number of the newest plan that is not outstanding."""
    message: worker_pb2.GenerateStepRequest = field(default_factory=worker_pb2.GenerateStepRequest)
    sampling: dict[int, Sequence] = field(default_factory=dict)
    """Who samples in every step, by slot."""
    prefilled: list[Sequence] = field(default_factory=list)
    """Sequences with a chunk in this plan."""
    admitted: list[tuple[Sequence, int]] = field(default_factory=list)
    """Sequences whose request gets its first slot, each with its tokens found in the prefix cache."""
    receiving: list[Sequence] = field(default_factory=list)
    """Sequences that got blocks, into which their KV is to be fetched."""
    does_not_fit: list[tuple[RequestState, str]] = field(default_factory=list)
    """Requests that can never go on, and why. They are ended after the plan, of which they may be a part."""

    @property
    def decodes_only(self) -> bool:
        """Whether every sequence computes one token in a step."""
        return not self.prefilled

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to tell the ranks."""
        return not self.message.steps and not self.message.releases

    def is_settled(self, sequence: Sequence) -> bool:
        """Whether no outstanding plan computes the sequence, so that all its tokens are committed."""
        return sequence.last_plan <= self.last_done


@dataclass(slots=True)
class PlanCounts:
    """What planning has come to, over all epochs."""

    prefix_queries: int = 0
    """Tokens of admitted requests that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Of these, tokens found there."""
    preemptions: int = 0
    """Sequences that lost their blocks, to be computed again."""


class Planner:
    """The rules of planning. Decodes come first, then known tokens in chunks, by priority and arrival.

    A plan has several steps only while nothing waits and nothing prefills, so that an arrival waits for
    no more than the plans already sent, each of which is expected to be short.
    """

    def __init__(self, placement: Placement, step_times: StepTimes, counts: PlanCounts) -> None:
        self._placement = placement
        self._step_times = step_times
        self._config = placement.config
        self._counts = counts

    def make(self, *, number: int, last_done: int) -> Draft:
        """The next plan; its message is empty (no steps, no releases) when nothing can run."""
        draft = Draft(number, last_done)
        decodes = self._ready_to_decode()
        steps = self._count_steps(decodes)
        decodes, steps = self._make_room(draft, decodes, steps)
        self._plan_decodes(draft, decodes, steps)
        self._plan_prefill(draft, self._config.max_num_batched_tokens - len(decodes))
        message = draft.message
        message.releases.extend(self._placement.take_releases())
        if decodes or draft.prefilled:
            message.steps = steps
        else:
            # A plan without steps is answered only when asked.
            message.ack_now = bool(message.releases)
        return draft

    # ------------------------------------------------------------------------------------ decodes

    def _ready_to_decode(self) -> list[Sequence]:
        ready = [
            sequence
            for sequence in self._placement.slots
            if sequence is not None and sequence.left and sequence.computed_length >= sequence.known_length
        ]
        most = self._config.max_num_batched_tokens
        if len(ready) > most:
            first = sorted(ready, key=lambda sequence: sequence.order)[:most]
            ready = sorted(first, key=lambda sequence: sequence.slot)
        return ready

    def _count_steps(self, decodes: list[Sequence]) -> int:
        placement = self._placement
        if not decodes or placement.waiting or any(sequence.prefilling for sequence in placement.running()):
            return 1
        most = min(self._config.max_steps, max(sequence.left for sequence in decodes))
        return self._step_times.steps_within(len(decodes), self._config.multi_step_budget_seconds, most)

    def _make_room(self, draft: Draft, decodes: list[Sequence], steps: int) -> tuple[list[Sequence], int]:
        """Sees that there are blocks for the decodes: with fewer steps, else with fewer sequences."""
        pool = self._placement.pool
        while decodes and self._blocks_missing(decodes, steps) > pool.available:
            if steps > 1:
                steps //= 2
                continue
            if (kept := self._placement.kept.oldest()) is not None:
                # Whoever runs goes before what another gang may never come for.
                self._placement.drop(kept)
                continue
            running = self._placement.running()
            if len(running) == 1:
                if self._placement.receiving or len(self._placement.kept):
                    # What moves between gangs can't be taken, but its end is near.
                    return [], steps
                # It has every block that is held. What it waits for may still end it within its blocks.
                if draft.is_settled(running[0]):
                    self._give_up(draft, running[0], running[0].computed_length + 1)
                return [], steps
            # A sequence that has all its outputs planned loses nothing; else the last in order goes.
            victim = max(running, key=lambda sequence: (sequence.left == 0, sequence.order))
            self._placement.preempt(victim)
            self._counts.preemptions += 1
            decodes = [sequence for sequence in decodes if sequence is not victim]
        return decodes, steps

    def _blocks_missing(self, decodes: list[Sequence], steps: int) -> int:
        block_size = self._config.block_size
        missing = 0
        for sequence in decodes:
            left = sequence.left
            excess = sequence.computed_length + (steps if steps < left else left) - sequence.capacity
            if excess > 0:
                missing += -(-excess // block_size)
        return missing

    def _plan_decodes(self, draft: Draft, decodes: list[Sequence], steps: int) -> None:
        sampling = draft.sampling
        for sequence in decodes:
            planned = min(steps, sequence.left)
            sequence.left -= planned
            sequence.computed_length += planned
            sequence.last_plan = draft.number
            sampling[sequence.slot] = sequence
            if sequence.computed_length > sequence.capacity:
                start = len(sequence.blocks)
                blocks = self._placement.grow(sequence)
                draft.message.block_table_deltas.add(slot=sequence.slot, start=start, blocks=blocks)
        draft.message.decode_slots.extend(sampling)

    # ------------------------------------------------------------------------------------ prefill

    def _plan_prefill(self, draft: Draft, budget: int) -> None:
        placement = self._placement
        for sequence in placement.take_arrivals():
            self._announce(draft, sequence)
        running = [sequence for sequence in placement.running() if sequence.prefilling]
        prefilling = deque(sorted(running, key=lambda sequence: sequence.order))
        waiting = iter(placement.candidates() if placement.slot_is_free else ())
        candidate = next(waiting, None)
        while budget > 0 and (prefilling or candidate is not None):
            if candidate is None or (prefilling and prefilling[0].order < candidate.order):
                budget -= self._plan_chunk(draft, prefilling.popleft(), budget)
                continue
            verdict = self._try_to_admit(draft, candidate)
            if verdict is _Verdict.ADMITTED:
                budget -= self._plan_chunk(draft, candidate, budget)
            candidate = None if verdict is _Verdict.BLOCKED else next(waiting, None)
        # Only now, so that nobody admitted by this plan reads what the same step writes.
        for sequence in draft.prefilled:
            placement.cache_prefix(sequence, sequence.computed_length)
        self._plan_snapshots(draft)

    def _plan_snapshots(self, draft: Draft) -> None:
        placement, saves = self._placement, draft.message.state_saves
        for sequence in draft.prefilled:
            if len(saves) == placement.snapshots.places:
                # One more would take the place of one that is made in this very plan.
                return
            place = placement.save_state(sequence)
            if place is not None:
                saves.add(slot=sequence.slot, snapshot=place)

    def _plan_chunk(self, draft: Draft, sequence: Sequence, budget: int) -> int:
        length = self._placement.snapshots.chunk_end(sequence, budget) - sequence.computed_length
        sequence.computed_length += length
        sequence.last_plan = draft.number
        draft.prefilled.append(sequence)
        draft.message.prefill_chunks.add(slot=sequence.slot, length=length)
        if not sequence.prefilling:
            sequence.left -= 1
            draft.sampling[sequence.slot] = sequence
        return length

    def _try_to_admit(self, draft: Draft, sequence: Sequence) -> _Verdict:
        placement = self._placement
        sibling = self._find_sibling(draft, sequence)
        if sibling is not None and (sibling.prefilling or sibling in draft.prefilled):
            return _Verdict.LATER
        if not draft.is_settled(sequence) or not placement.slot_is_free:
            return _Verdict.BLOCKED
        known_length = len(sequence.token_ids)
        needed = self._config.blocks_for(known_length)
        if needed > placement.pool.num_blocks:
            self._give_up(draft, sequence, known_length)
            return _Verdict.LATER
        if sequence.source is not None:
            if needed + placement.slots_used > placement.pool.available:
                return _Verdict.BLOCKED
            placement.receive(sequence)
            draft.receiving.append(sequence)
            return _Verdict.LATER
        if sibling is None:
            prefix = placement.find_prefix(sequence)
            computed_length = len(prefix.blocks) * self._config.block_size
        else:
            computed_length = known_length - 1
            prefix = Prefix(sibling.blocks[: computed_length // self._config.block_size])
        shared = prefix.blocks
        # Everybody running is left a block to grow into, or the newcomer would soon be sent back.
        spare = placement.slots_used
        if needed - len(shared) + placement.pool.unheld(shared) + spare > placement.pool.available:
            return _Verdict.BLOCKED
        placement.place(sequence, shared=shared, computed_length=computed_length)
        self._announce(draft, sequence, snapshot=placement.restore_state(sequence, prefix))
        if sibling is not None and computed_length % self._config.block_size:
            # The block that both continue, each with its own tokens.
            index = len(shared)
            draft.message.block_copies.add(source=sibling.blocks[index], target=sequence.blocks[index])
        return _Verdict.ADMITTED

    def _find_sibling(self, draft: Draft, sequence: Sequence) -> Sequence | None:
        """A running sample of the same request whose blocks hold, or are going to hold, all of this one's tokens."""
        state = sequence.state
        if not self._config.share_blocks:
            return None
        if state.samples_in_slots == 0 or len(sequence.token_ids) > state.base_length:
            return None
        running = [sample for sample in state.samples if sample.status is SequenceStatus.RUNNING]
        return min(running, key=lambda sample: (sample.prefilling or sample in draft.prefilled, sample.order))

    def _announce(self, draft: Draft, sequence: Sequence, *, snapshot: int | None = None) -> None:
        """Tells the ranks of a newly placed sequence, and the metrics of a newly admitted request.

        snapshot: of the recurrent state that it begins with.
        """
        message = draft.message
        message.admissions.add(
            slot=sequence.slot,
            token_ids=sequence.token_ids,
            prompt_length=sequence.prompt_length,
            computed_length=sequence.computed_length,
            sampling=sequence.sampling,
            state_received=sequence.source is not None,
            state_snapshot=snapshot,
        )
        message.block_table_deltas.add(slot=sequence.slot, start=0, blocks=sequence.blocks)
        if not sequence.state.admitted:
            sequence.state.admitted = True
            received = sequence.source is not None
            found = min(sequence.computed_length, sequence.prompt_length) if received else sequence.computed_length
            draft.admitted.append((sequence, found))
            if self._config.prefix_cache and not received:
                self._counts.prefix_queries += sequence.known_length
                self._counts.prefix_hits += sequence.computed_length
        # Should it lose its blocks, it is computed like any other.
        sequence.source = None

    def _give_up(self, draft: Draft, sequence: Sequence, tokens: int) -> None:
        config = self._config
        message = (
            f"KV cache too small: a sequence of {tokens} tokens needs {config.blocks_for(tokens)} blocks of "
            f"{config.block_size} tokens, the cache has {config.num_blocks}"
        )
        draft.does_not_fit.append((sequence.state, message))
