"""A rank without a model: refuses what cannot be, and knows of every KV cell which prefix it belongs to.

A token's "KV" is a tag of its whole prefix, and the "model" makes the next token of the tag that it
finds in the cache. So a block that is shared wrongly, given away too early or not copied shows at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tpmodel.v1 import worker_pb2

STOP_ID = 0


def extend_tag(tag: int, token_id: int) -> int:
    """The tag of a prefix that is one token longer."""
    return hash((tag, token_id))


def sample(tag: int, output_index: int, sampling: worker_pb2.SlotSampling, vocabulary: int) -> int:
    """The token after the prefix with this tag: what the simulated model samples."""
    token_id = hash((tag, sampling.seed, sampling.sample_index, output_index)) % vocabulary
    if token_id in sampling.stop_token_ids and output_index < sampling.min_tokens:
        return vocabulary
    return token_id


def finished_after(
    token_id: int, output_count: int, sampling: worker_pb2.SlotSampling
) -> worker_pb2.Finished.ValueType:
    """Whether the sequence ends with this token, its output_count-th."""
    if token_id in sampling.stop_token_ids:
        return worker_pb2.FINISHED_STOP
    return worker_pb2.FINISHED_LENGTH if output_count >= sampling.max_tokens else worker_pb2.FINISHED_UNSPECIFIED


def true_outputs(prompt: Sequence[int], sampling: worker_pb2.SlotSampling, vocabulary: int) -> list[int]:
    """Every output of a sequence that nothing disturbs, the last one ending it."""
    tag = 0
    for token_id in prompt:
        tag = extend_tag(tag, token_id)
    outputs: list[int] = []
    while not outputs or not finished_after(outputs[-1], len(outputs), sampling):
        outputs.append(sample(tag, len(outputs), sampling, vocabulary))
        tag = extend_tag(tag, outputs[-1])
    return outputs


@dataclass(slots=True)
class SimulatedSlot:
    """A sequence as the rank knows it."""

    tokens: list[int]
    """Known at admission, then sampled."""
    prompt_length: int
    known_length: int
    computed_length: int
    sampling: worker_pb2.SlotSampling
    tags: list[int]
    """Of each of tokens' prefixes."""
    state: int = 0
    """The tag of the prefix that its recurrent state has seen."""
    table: list[int] = field(default_factory=list)
    finished: bool = False

    @property
    def decoding(self) -> bool:
        """Whether it has sampled."""
        return self.computed_length >= self.known_length


class SimulatedRank:
    """Executes plans at once, as strictly as a rank: AssertionError for a plan that a rank would refuse."""

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        slots: int,
        max_step_tokens: int,
        max_len: int,
        vocabulary: int,
        keeps_state: bool = False,
        snapshots: int = 0,
    ) -> None:
        """keeps_state: tokens need the state behind those before them; snapshots: places for copies of it."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_slots = slots
        self.max_step_tokens = max_step_tokens
        self.max_len = max_len
        self.vocabulary = vocabulary
        self.keeps_state = keeps_state
        self.snapshots: list[int | None] = [None] * snapshots
        self.slots: dict[int, SimulatedSlot] = {}
        self.computed_tokens = 0
        self._kv: dict[tuple[int, int], int] = {}
        self._written_by: dict[int, int] = {}

    def execute(self, plan: worker_pb2.GenerateStepRequest) -> list[worker_pb2.GenerateStepOk]:
        """Rank 0's replies, one for each step (one for a plan without steps that asks for it)."""
        for slot in plan.releases:
            assert slot in self.slots, f"slot {slot} is released but empty"
            del self.slots[slot]
        for admission in plan.admissions:
            self._admit(admission)
        for delta in plan.block_table_deltas:
            self._extend(delta)
        for copy in plan.block_copies:
            assert copy.source != copy.target
            for offset in range(self.block_size):
                self._kv.pop((copy.target, offset), None)
                if (copy.source, offset) in self._kv:
                    self._kv[copy.target, offset] = self._kv[copy.source, offset]
        self._check_work(plan)
        if plan.steps == 0:
            assert plan.ack_now, "nobody would answer"
            return [worker_pb2.GenerateStepOk()]
        replies = [self._step(plan, step) for step in range(plan.steps)]
        places = [save.snapshot for save in plan.state_saves]
        assert len(places) == len(set(places)), "a snapshot is made twice"
        for save in plan.state_saves:
            assert any(chunk.slot == save.slot for chunk in plan.prefill_chunks), "what decodes may have finished"
            self.snapshots[save.snapshot] = self.slots[save.slot].state
        return replies

    def blocks_held(self) -> Counter[int]:
        """How many slots have each block in their table."""
        return Counter(block for slot in self.slots.values() for block in slot.table)

    def read_kv(self, blocks: Sequence[int], tokens: int) -> list[int]:
        """The KV of a sequence's first tokens, as another gang fetches it."""
        return [self._kv[blocks[token // self.block_size], token % self.block_size] for token in range(tokens)]

    def write_kv(self, blocks: Sequence[int], kv: Sequence[int]) -> None:
        """What came from another gang."""
        for token, tag in enumerate(kv):
            self._kv[blocks[token // self.block_size], token % self.block_size] = tag

    def _admit(self, admission: worker_pb2.Admission) -> None:
        slot, known = admission.slot, len(admission.token_ids)
        assert slot < self.max_slots
        assert slot not in self.slots, f"slot {slot} is admitted to but in use"
        assert 1 <= admission.prompt_length <= known < self.max_len
        assert admission.computed_length < known
        assert known - admission.prompt_length < admission.sampling.max_tokens
        tags = [0]
        for token_id in admission.token_ids:
            tags.append(extend_tag(tags[-1], token_id))
        self.slots[slot] = SimulatedSlot(
            tokens=list(admission.token_ids),
            prompt_length=admission.prompt_length,
            known_length=known,
            computed_length=admission.computed_length,
            sampling=admission.sampling,
            tags=tags[1:],
            state=self._first_state(admission, tags),
        )

    def _first_state(self, admission: worker_pb2.Admission, tags: Sequence[int]) -> int:
        """tags: of no token, of the first, and so on."""
        behind = tags[admission.computed_length]
        if admission.HasField("state_snapshot"):
            assert self.keeps_state
            assert self.snapshots[admission.state_snapshot] == behind, "the snapshot is of other tokens"
        elif self.keeps_state and not admission.state_received:
            assert admission.computed_length == 0, "blocks do not hold the state"
        return behind

    def _extend(self, delta: worker_pb2.BlockTableDelta) -> None:
        table = self.slots[delta.slot].table
        assert delta.start == len(table), "a delta leaves a hole or writes over blocks"
        assert all(block < self.num_blocks for block in delta.blocks)
        table.extend(delta.blocks)
        assert len(set(table)) == len(table), "a block twice in one table"

    def _check_work(self, plan: worker_pb2.GenerateStepRequest) -> None:
        decodes = list(plan.decode_slots)
        chunks = {chunk.slot: chunk.length for chunk in plan.prefill_chunks}
        assert plan.steps <= 8
        assert bool(decodes or chunks) == bool(plan.steps)
        assert not chunks or plan.steps == 1, "prefill in a plan of several steps"
        assert len(chunks) == len(plan.prefill_chunks), "two chunks for one slot"
        assert decodes == sorted(set(decodes))
        assert len(decodes) + sum(chunks.values()) <= self.max_step_tokens
        for slot in decodes:
            assert self.slots[slot].decoding, f"slot {slot} decodes but has not sampled"
        for slot, length in chunks.items():
            state = self.slots[slot]
            assert length >= 1
            assert state.computed_length + length <= state.known_length

    def _step(self, plan: worker_pb2.GenerateStepRequest, step: int) -> worker_pb2.GenerateStepOk:
        self._written_by.clear()
        sampled: list[int] = []
        for slot in plan.decode_slots:
            if not self.slots[slot].finished:
                self._compute(slot)
                sampled.append(slot)
        for chunk in plan.prefill_chunks:
            for _ in range(chunk.length):
                self._compute(chunk.slot)
            if self.slots[chunk.slot].decoding:
                sampled.append(chunk.slot)
        reply = worker_pb2.GenerateStepOk(step=step)
        logprobs_wanted = any(self.slots[slot].sampling.logprobs >= 0 for slot in sampled)
        for slot in sorted(sampled):
            state = self.slots[slot]
            outputs = len(state.tokens) - state.prompt_length
            token_id = sample(self._find(slot, state.computed_length - 1), outputs, state.sampling, self.vocabulary)
            state.tokens.append(token_id)
            state.tags.append(extend_tag(state.tags[-1], token_id))
            finished = finished_after(token_id, outputs + 1, state.sampling)
            state.finished = bool(finished)
            reply.slots.append(slot)
            reply.token_ids.append(token_id)
            reply.finished.append(finished)
            if logprobs_wanted:
                reply.logprobs.add(logprob=-float(token_id))
        return reply

    def _compute(self, slot: int) -> None:
        """Writes the KV of the slot's next token, with the slot's whole prefix before its eyes."""
        state = self.slots[slot]
        position = state.computed_length
        assert position // self.block_size < len(state.table), f"slot {slot} has no block for position {position}"
        block = state.table[position // self.block_size]
        others = [other for other, that in self.slots.items() if other != slot and block in that.table]
        assert not others, f"slot {slot} writes to block {block}, which slots {others} hold too"
        for earlier in range(position):
            assert self._find(slot, earlier) == state.tags[earlier], f"slot {slot} sees another prefix at {earlier}"
        assert state.state == (state.tags[position - 1] if position else 0), f"slot {slot} has another state"
        state.state = state.tags[position]
        self._kv[block, position % self.block_size] = state.tags[position]
        self._written_by[block] = slot
        state.computed_length += 1
        self.computed_tokens += 1

    def _find(self, slot: int, position: int) -> int:
        block = self.slots[slot].table[position // self.block_size]
        assert self._written_by.get(block, slot) == slot, f"slot {slot} reads block {block} in the step that writes it"
        return self._kv[block, position % self.block_size]
