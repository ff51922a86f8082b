"""The step runner, with a model whose next token is a known function of the whole sequence in the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.models.batch import ForwardBatch, LayerKvCache
from tpmodel_worker.rank.errors import InvalidPlanError
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.replies import StepOutcome
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.session import EpochEndedError
from tpmodel_worker.rank.slots import SlotLimits, SlotTable

CPU = torch.device("cpu")
VOCABULARY = 97
BLOCK = 4
LIMITS = SlotLimits(max_slots=4, block_size=BLOCK, max_blocks=8, num_blocks=24)


def next_token(tokens: Sequence[int]) -> int:
    return sum((place + 1) * (token + 3) for place, token in enumerate(tokens)) % VOCABULARY


def expected(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class TokenModel:
    """Keeps token ids as keys; reads the whole sequence back through the block table."""

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerKvCache]) -> torch.Tensor:
        keys = caches[0].keys.view(-1)
        keys[batch.kv_rows] = batch.token_ids.float()
        assert int(batch.kv_lengths.max()) <= batch.max_kv_length
        assert batch.block_tables.shape[1] == -(-batch.max_kv_length // BLOCK)
        ends = (batch.query_starts[1:] - 1).tolist()
        assert batch.query_starts.tolist() == np.cumsum([0, *batch.query_lengths]).tolist()
        logits = torch.zeros(len(batch.sample_rows), 128)
        logits[:, VOCABULARY:] = -torch.inf
        for place, row in enumerate(batch.sample_rows.tolist()):
            sequence = ends.index(row)
            length = int(batch.kv_lengths[sequence])
            assert int(batch.positions[row]) == length - 1
            rows = [int(batch.block_tables[sequence, at // BLOCK]) * BLOCK + at % BLOCK for at in range(length)]
            logits[place, next_token([int(keys[at]) for at in rows])] = 1.0
        return logits


class Cache:
    def __init__(self) -> None:
        shape = (LIMITS.num_blocks + 1, BLOCK, 1, 1)
        self.layers = (LayerKvCache(keys=torch.zeros(shape), values=torch.zeros(shape)),)

    def reset_states(self, slots: Sequence[int]) -> None:
        """The model keeps none."""

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        self.layers[0].keys[targets] = self.layers[0].keys[sources]


class Rank:
    """A runner and what it has said."""

    def __init__(self) -> None:
        self.cache = Cache()
        self.sampler = Sampler(
            SingleCommunicator(CPU), vocab_size=VOCABULARY, vocab_start=0, vocab_shard=128, max_slots=4, device=CPU
        )
        self.runner = StepRunner(
            model=cast("Any", TokenModel()),
            cache=cast("Any", self.cache),
            slots=SlotTable(LIMITS, CPU),
            sampler=self.sampler,
            limits=PlanLimits(LIMITS, VOCABULARY, 64),
            device=CPU,
        )
        self.outcomes: list[StepOutcome] = []
        self.outputs: dict[int, list[int]] = {slot: [] for slot in range(LIMITS.max_slots)}
        self.finished: dict[int, int] = {}
        self.seq = 0

    def execute(self, **parts: Any) -> None:
        self.seq += 1
        self.runner.execute(self.seq, pb.GenerateStepRequest(**parts), submit=self._submit, check=lambda: None)

    def _submit(self, outcome: StepOutcome) -> None:
        self.outcomes.append(outcome)
        if outcome.sampled is None:
            return
        for slot, token, finished, sampled in zip(outcome.slots, *outcome.sampled.wait(), strict=True):
            if sampled:
                assert slot not in self.finished, "a finished slot idles"
                self.outputs[slot].append(int(token))
                if finished:
                    self.finished[slot] = int(finished)


def admission(
    slot: int, tokens: Sequence[int], *, max_tokens: int = 20, stops: Sequence[int] = (), **changes: Any
) -> pb.Admission:
    sampling = pb.SlotSampling(
        top_p=1.0, repetition_penalty=1.0, max_tokens=max_tokens, logprobs=-1, stop_token_ids=stops
    )
    fields: dict[str, Any] = {"prompt_length": len(tokens)} | changes
    return pb.Admission(slot=slot, token_ids=tokens, sampling=sampling, **fields)


def delta(slot: int, *blocks: int, start: int = 0) -> pb.BlockTableDelta:
    return pb.BlockTableDelta(slot=slot, start=start, blocks=blocks)


def chunk(slot: int, length: int) -> pb.PrefillChunk:
    return pb.PrefillChunk(slot=slot, length=length)


@pytest.fixture
def rank() -> Rank:
    return Rank()


def test_prefill_samples_and_decode_continues(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(1, [5, 6, 7])], block_table_deltas=[delta(1, 9, 4)], prefill_chunks=[chunk(1, 3)], steps=1
    )
    rank.execute(decode_slots=[1], steps=4)
    assert rank.outputs[1] == expected([5, 6, 7], 5)
    assert [(outcome.seq, outcome.step, outcome.last) for outcome in rank.outcomes] == [
        (1, 0, True),
        (2, 0, False),
        (2, 1, False),
        (2, 2, False),
        (2, 3, True),
    ]


def test_a_chunk_that_ends_before_the_last_known_token_samples_nothing(rank: Rank) -> None:
    prompt = list(range(7))
    rank.execute(
        admissions=[admission(0, prompt)], block_table_deltas=[delta(0, 2, 1)], prefill_chunks=[chunk(0, 5)], steps=1
    )
    assert rank.outcomes[0].sampled is None
    rank.execute(prefill_chunks=[chunk(0, 2)], steps=1)
    assert rank.outputs[0] == expected(prompt, 1)


def test_decodes_and_chunks_share_a_step(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(2, [8, 1])], block_table_deltas=[delta(2, 0, 1)], prefill_chunks=[chunk(2, 2)], steps=1
    )
    rank.execute(
        admissions=[admission(0, [4] * 6), admission(3, [9] * 5)],
        block_table_deltas=[delta(0, 5, 6), delta(3, 7, 8)],
        decode_slots=[2],
        prefill_chunks=[chunk(3, 3), chunk(0, 6)],
        steps=1,
    )
    assert rank.outcomes[-1].slots.tolist() == [2, 0]
    rank.execute(decode_slots=[0, 2], prefill_chunks=[chunk(3, 2)], steps=1)
    rank.execute(decode_slots=[0, 2, 3], steps=1)
    assert rank.outputs == {0: expected([4] * 6, 3), 1: [], 2: expected([8, 1], 4), 3: expected([9] * 5, 2)}


def test_a_stop_id_finishes_and_the_slot_idles_in_the_scratch_block(rank: Rank) -> None:
    stopped, running = expected([1, 2], 3), expected([3, 4], 9)
    rank.execute(
        admissions=[admission(0, [1, 2], stops=[stopped[2], 96]), admission(1, [3, 4])],
        block_table_deltas=[delta(0, 0, 1, 2), delta(1, 3, 4, 5)],
        prefill_chunks=[chunk(0, 2), chunk(1, 2)],
        steps=1,
    )
    rank.execute(decode_slots=[0, 1], steps=2)
    before = rank.cache.layers[0].keys[0:3].clone()
    rank.execute(decode_slots=[0, 1], steps=6)
    assert rank.outputs[0] == stopped
    assert rank.finished == {0: pb.FINISHED_STOP}
    assert rank.outputs[1] == running
    assert torch.equal(rank.cache.layers[0].keys[0:3], before)


def test_max_tokens_finishes_with_length_and_a_stop_id_as_the_last_token_with_stop(rank: Rank) -> None:
    last = expected([2, 2], 3)[-1]
    rank.execute(
        admissions=[
            admission(0, [1, 1], max_tokens=3),
            admission(1, [2, 2], max_tokens=3, stops=[last]),
            admission(2, [7], max_tokens=1),
        ],
        block_table_deltas=[delta(0, 0), delta(1, 1), delta(2, 2)],
        prefill_chunks=[chunk(0, 2), chunk(1, 2), chunk(2, 1)],
        steps=1,
    )
    rank.execute(decode_slots=[0, 1, 2], steps=5)
    assert {slot: len(output) for slot, output in rank.outputs.items()} == {0: 3, 1: 3, 2: 1, 3: 0}
    assert rank.finished == {0: pb.FINISHED_LENGTH, 1: pb.FINISHED_STOP, 2: pb.FINISHED_LENGTH}


def test_known_outputs_count_towards_max_tokens(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(0, [1, 2, 3, 4, 5], prompt_length=2, max_tokens=5)],
        block_table_deltas=[delta(0, 0, 1)],
        prefill_chunks=[chunk(0, 5)],
        steps=1,
    )
    rank.execute(decode_slots=[0], steps=3)
    assert rank.outputs[0] == expected([1, 2, 3, 4, 5], 2)
    assert rank.finished == {0: pb.FINISHED_LENGTH}


def test_a_prefix_hit_computes_only_the_rest(rank: Rank) -> None:
    prompt = [5, 4, 3, 2, 1, 0]
    rank.execute(
        admissions=[admission(0, prompt)], block_table_deltas=[delta(0, 10, 11)], prefill_chunks=[chunk(0, 6)], steps=1
    )
    other = [*prompt[:4], 50, 51, 52]
    rank.execute(
        admissions=[admission(1, other, computed_length=4)],
        block_table_deltas=[delta(1, 10, 12)],
        prefill_chunks=[chunk(1, 3)],
        steps=1,
    )
    assert rank.outputs[1] == expected(other, 1)


def test_block_copies_apply_in_order_before_the_step(rank: Rank) -> None:
    prompt = [5, 4, 3]
    rank.execute(
        admissions=[admission(0, prompt)], block_table_deltas=[delta(0, 10)], prefill_chunks=[chunk(0, 3)], steps=1
    )
    first = rank.outputs[0][0]
    copies = [(10, 11), (11, 12), (13, 11)]
    rank.execute(
        admissions=[admission(1, [*prompt, first], prompt_length=3, computed_length=3)],
        block_table_deltas=[delta(1, 12)],
        block_copies=[pb.BlockCopy(source=source, target=target) for source, target in copies],
        decode_slots=[0],
        prefill_chunks=[chunk(1, 1)],
        steps=1,
    )
    assert rank.outputs[1] == rank.outputs[0][1:] == expected([*prompt, first], 1)
    assert rank.cache.layers[0].keys[11].abs().sum() == 0


def test_a_released_slot_takes_a_new_sequence_in_the_same_plan(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(0, [1], max_tokens=1, stops=[7] * 5)],
        block_table_deltas=[delta(0, 3)],
        prefill_chunks=[chunk(0, 1)],
        steps=1,
    )
    rank.outputs[0].clear()
    rank.finished.clear()
    rank.execute(
        releases=[0],
        admissions=[admission(0, [2, 3])],
        block_table_deltas=[delta(0, 3)],
        prefill_chunks=[chunk(0, 2)],
        steps=1,
    )
    rank.execute(decode_slots=[0], steps=2)
    assert rank.outputs[0] == expected([2, 3], 3)
    assert not rank.finished


def test_a_settling_plan_has_one_outcome_without_tokens(rank: Rank) -> None:
    rank.execute(ack_now=True)
    (outcome,) = rank.outcomes
    assert (outcome.last, outcome.ack_now, outcome.sampled) == (True, True, None)


def test_a_refused_plan_changes_nothing(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(0, [1, 2])], block_table_deltas=[delta(0, 0, 1)], prefill_chunks=[chunk(0, 2)], steps=1
    )
    with pytest.raises(InvalidPlanError):
        rank.execute(releases=[0], decode_slots=[3], steps=1)
    rank.execute(decode_slots=[0], steps=2)
    assert rank.outputs[0] == expected([1, 2], 3)


def test_an_ended_epoch_stops_between_steps(rank: Rank) -> None:
    rank.execute(
        admissions=[admission(0, [1, 2])], block_table_deltas=[delta(0, 0, 1)], prefill_chunks=[chunk(0, 2)], steps=1
    )

    def ended() -> None:
        if len(rank.outcomes) == 3:
            raise EpochEndedError("test")

    with pytest.raises(EpochEndedError):
        rank.runner.execute(2, pb.GenerateStepRequest(decode_slots=[0], steps=6), submit=rank._submit, check=ended)
    assert len(rank.outputs[0]) == 3


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_any_mixture_of_chunks_steps_and_slots_gives_the_same_tokens(data: st.DataObject) -> None:
    rank = Rank()
    prompts = data.draw(st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=14), min_size=1, max_size=4))
    maxima = [data.draw(st.integers(1, 6 * BLOCK - len(prompt))) for prompt in prompts]
    tables = [data.draw(st.permutations(range(slot * 6, slot * 6 + 6))) for slot in range(len(prompts))]
    rank.execute(
        admissions=[admission(slot, prompt, max_tokens=maxima[slot]) for slot, prompt in enumerate(prompts)],
        block_table_deltas=[delta(slot, *blocks) for slot, blocks in enumerate(tables)],
    )
    left = {slot: len(prompt) for slot, prompt in enumerate(prompts)}
    for _ in range(20):
        some = [slot for slot in left if data.draw(st.booleans())]
        chunks = [chunk(slot, data.draw(st.integers(1, left[slot]))) for slot in some if left[slot]]
        decodes = [slot for slot in some if not left[slot]]
        steps = 1 if chunks else data.draw(st.integers(1, 8))
        if some:
            rank.execute(decode_slots=decodes, prefill_chunks=chunks, steps=steps)
        for done in chunks:
            left[done.slot] -= done.length
    for slot, prompt in enumerate(prompts):
        assert rank.outputs[slot] == expected(prompt, len(rank.outputs[slot]))
        assert len(rank.outputs[slot]) <= maxima[slot]
        assert (slot in rank.finished) == (len(rank.outputs[slot]) == maxima[slot])
