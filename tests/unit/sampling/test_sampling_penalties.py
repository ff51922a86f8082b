"""Penalties and min_tokens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from support.sampling_world import CPU, Row, World
from tpmodel_worker.rank.penalties import PenaltyCounts, PenaltyRows

VOCAB_SIZE = 128
token_lists = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)


def make_logits(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def penalised_rows(counts: PenaltyCounts, slots: list[int], **penalties: float) -> PenaltyRows:
    def column(name: str, off: float) -> torch.Tensor:
        return torch.full((len(slots), 1), penalties.get(name, off))

    return PenaltyRows(
        rows=torch.arange(len(slots)),
        batch_rows=torch.arange(len(slots)),
        stored_rows=torch.tensor([counts.stored_row(slot) for slot in slots]),
        repetition=column("repetition", 1.0),
        presence=column("presence", 0.0),
        frequency=column("frequency", 0.0),
    )


def shard_counts(shards: int) -> list[PenaltyCounts]:
    size = VOCAB_SIZE // shards
    return [PenaltyCounts(vocab_start=rank * size, vocab_shard=size, device=CPU) for rank in range(shards)]


def penalise(
    logits: torch.Tensor, prompt: list[int], outputs: list[int], shards: int, **penalties: float
) -> torch.Tensor:
    parts = [part.clone() for part in logits.chunk(shards, dim=1)]
    for counts, part in zip(shard_counts(shards), parts, strict=True):
        counts.admit(3, prompt, outputs)
        counts.apply(part, penalised_rows(counts, [3], **penalties))
    return torch.cat(parts, dim=1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), prompt=token_lists, outputs=token_lists, penalty=st.sampled_from([0.7, 1.1, 2.0]))
def test_repetition_penalty_is_that_of_transformers(seed: int, prompt: list[int], outputs: list[int], penalty: float):
    """Over prompt and output alike, however often a token came."""
    logits = make_logits(seed)
    ids = torch.tensor([prompt + outputs], dtype=torch.int64)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())  # type: ignore[arg-type]
    for shards in (1, 2):
        actual = penalise(logits, prompt, outputs, shards, repetition=penalty)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    prompt=token_lists,
    outputs=token_lists,
    presence=st.sampled_from([0.0, 0.5, -1.25]),
    frequency=st.sampled_from([0.0, 0.25, -0.5]),
)
def test_presence_and_frequency_are_subtracted_for_outputs_only(
    seed: int, prompt: list[int], outputs: list[int], presence: float, frequency: float
):
    logits = make_logits(seed)
    expected = logits.clone()
    for token, count in Counter(outputs).items():
        expected[0, token] -= count * frequency + presence
    actual = penalise(logits, prompt, outputs, 2, presence=presence, frequency=frequency)
    torch.testing.assert_close(actual, expected)


def test_all_penalties_apply_in_their_order():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, :4] = torch.tensor([2.0, -2.0, 2.0, -torch.inf])
    actual = penalise(logits, [0, 1], [1, 1, 3], 1, repetition=2.0, presence=0.5, frequency=0.25)
    assert actual[0, :4].tolist() == [1.0, -5.0, 2.0, -torch.inf]


def test_counting_a_token_equals_admitting_it():
    logits = make_logits(0, rows=3)
    penalties = {"repetition": 1.2, "presence": 0.3, "frequency": 0.4}
    for counted, admitted in zip(shard_counts(2), shard_counts(2), strict=True):
        for slot, tokens in enumerate([[5, 5], [100], [7, 8]]):
            counted.admit(slot, [1], [])
            admitted.admit(slot, [1], tokens)
        for tokens, active in (((5, 100, 7), (True, True, True)), ((5, 9, 8), (True, False, True))):
            counted.count(torch.tensor(tokens), torch.tensor(active), penalised_rows(counted, [0, 1, 2]))
        results = []
        for counts in (counted, admitted):
            part = logits[:, :64].clone()
            counts.apply(part, penalised_rows(counts, [0, 1, 2], **penalties))
            results.append(part)
        assert torch.equal(*results)


def test_memory_follows_the_slots_that_use_penalties():
    counts = PenaltyCounts(vocab_start=0, vocab_shard=64, device=CPU)
    assert counts.bytes == 0
    for slot in range(9):
        counts.admit(slot, [slot], [slot])
    assert 9 * 64 * 5 <= counts.bytes <= 2 * 9 * 64 * 5
    for slot in range(9):
        counts.release(slot)
    assert counts.bytes == 0


def test_a_reused_row_starts_from_nothing():
    counts = PenaltyCounts(vocab_start=0, vocab_shard=VOCAB_SIZE, device=CPU)
    counts.admit(0, [1], [2])
    counts.admit(1, [], [])
    counts.release(0)
    counts.admit(2, [], [])
    logits = make_logits(1, rows=2)
    scores = logits.clone()
    counts.apply(scores, penalised_rows(counts, [1, 2], repetition=3.0, presence=1.0))
    assert torch.equal(scores, logits)


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_a_frequency_penalty_walks_down_the_logits(temperature: float):
    """Each sampled token is counted and then out of the way, so the ids come in the order of their logits."""
    logits = torch.linspace(5, 0, VOCAB_SIZE).unsqueeze(0)
    world = World(2, VOCAB_SIZE)
    world.admit(
        0, Row(logits[0], {"frequency_penalty": 100.0, "temperature": temperature, "top_k": 1 if temperature else 0})
    )
    assert [int(world.sample(logits, [0], [step]).token_ids) for step in range(80)] == list(range(80))


def test_an_inactive_row_is_not_counted():
    logits = torch.linspace(5, 0, VOCAB_SIZE).repeat(2, 1)
    world = World(2, VOCAB_SIZE)
    for slot in (0, 1):
        world.admit(slot, Row(logits[0], {"presence_penalty": 100.0}))
    world.sample(logits, [0, 1], [0, 0], active=[True, False])
    assert world.sample(logits, [0, 1], [1, 1]).token_ids.tolist() == [1, 0]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"temperature": 0.5, "top_k": 4}, {"temperature": 0.5, "top_p": 0.9}]
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_stop_ids_are_masked_until_min_tokens_are_out(settings: dict[str, Any], world_size: int):
    logits = torch.full((VOCAB_SIZE,), -10.0)
    logits[[3, 100]] = 40.0
    logits[50] = 20.0
    row_settings = {**settings, "min_tokens": 2, "stop_token_ids": [100, 3], "seed": 1}
    for count, expected in ((0, {50}), (1, {50}), (2, {3, 100}), (3, {3, 100})):
        token = World(world_size, VOCAB_SIZE).sample_rows([Row(logits, row_settings, outputs=[9] * count)])[0]
        assert token in expected


def test_min_tokens_of_one_row_leave_the_others_alone():
    logits = torch.linspace(5, 0, VOCAB_SIZE)
    rows = [
        Row(logits, {"stop_token_ids": [0]}),
        Row(logits, {"stop_token_ids": [0, 1], "min_tokens": 1}),
        Row(logits, {"min_tokens": 1}),
    ]
    assert World(2, VOCAB_SIZE).sample_rows(rows) == [0, 2, 0]
