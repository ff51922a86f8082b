"""A seed gives the same tokens at any world size, in any batch and after any replay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sampling_world import Row, World

VOCAB_SIZE = 333
VARIETY: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 1.4, "top_k": 200, "top_p": 0.7, "min_p": 0.01},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.1, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.02},
    {"temperature": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"repetition_penalty": 1.5},
    {"temperature": 1.2, "top_k": 5, "frequency_penalty": 0.5, "min_tokens": 30, "stop_token_ids": [1, 200]},
    {"min_tokens": 3, "stop_token_ids": [7], "logprobs": 2},
]
settings_of_a_row = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 0, 1, 7, 300]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.0, 0.1, 1.0]),
        "seed": st.integers(0, 2**64 - 1),
        "sample_index": st.integers(0, 3),
        "repetition_penalty": st.sampled_from([1.0, 1.2]),
        "presence_penalty": st.sampled_from([0.0, -0.5, 1.0]),
        "min_tokens": st.sampled_from([0, 4]),
        "stop_token_ids": st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
        "logprobs": st.sampled_from([-1, 0, 5]),
    }
)


def make_logits(seed: int, *, coarse: bool = False) -> torch.Tensor:
    """Random logits; coarse ones have many ties."""
    logits = torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if coarse else logits


@st.composite
def batches(draw: st.DrawFn) -> list[Row]:
    token_ids = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=6)
    count = draw(st.integers(1, 8))
    return [
        Row(
            make_logits(draw(st.integers(0, 1000)), coarse=draw(st.booleans())),
            draw(settings_of_a_row),
            prompt=draw(token_ids),
            outputs=draw(token_ids),
        )
        for _ in range(count)
    ]


@settings(max_examples=40, deadline=None)
@given(batches(), st.randoms(use_true_random=False))
def test_world_size_order_and_company_change_no_token(rows: list[Row], random: Any):
    together = World(1, VOCAB_SIZE).sample_rows(rows)
    assert World(2, VOCAB_SIZE).sample_rows(rows) == together
    assert World(4, VOCAB_SIZE).sample_rows(rows) == together
    order = list(range(len(rows)))
    random.shuffle(order)
    shuffled = World(1, VOCAB_SIZE).sample_rows([rows[index] for index in order])
    assert shuffled == [together[index] for index in order]
    assert [World(1, VOCAB_SIZE).sample_rows([row])[0] for row in rows] == together


@settings(max_examples=25, deadline=None)
@given(batches())
def test_gathered_candidates_and_the_sharded_search_agree(rows: list[Row]):
    """Both ways of top_k, ties included, keep the same tokens."""
    expected = World(2, VOCAB_SIZE).sample_rows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpmodel_worker.rank.slot_settings.MAX_CANDIDATES", 0)
        assert World(2, VOCAB_SIZE).sample_rows(rows) == expected


def test_blocks_of_rows_change_no_token(monkeypatch: pytest.MonkeyPatch):
    rows = [
        Row(make_logits(index), {**row_settings, "seed": index}, prompt=[1, 2], outputs=[3, 3, 200])
        for index, row_settings in enumerate(VARIETY * 2)
    ]
    expected = World(2, VOCAB_SIZE).sample_rows(rows)
    monkeypatch.setattr("tpmodel_worker.rank.token_keys._ELEMENTS_PER_BLOCK", {"cpu": 1})
    assert World(2, VOCAB_SIZE).sample_rows(rows) == expected


def generate(world: World, slots: list[int], outputs: list[list[int]], steps: int) -> None:
    """Extends the outputs with a made-up model, whose logits depend on sequence, position and last token."""
    for _ in range(steps):
        logits = torch.stack([make_logits(1000 * row + 10 * len(ids) + ids[-1] % 7) for row, ids in enumerate(outputs)])
        tokens = world.sample(logits, slots, [len(ids) for ids in outputs]).token_ids.tolist()
        for ids, token in zip(outputs, tokens, strict=True):
            ids.append(token)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_replay_from_the_outputs_so_far_continues_exactly(world_size: int):
    """Preempted after 9 of 24 tokens and admitted to other slots of other samplers: nothing changes."""
    rows = [Row(make_logits(0), {**row_settings, "seed": 5}, prompt=[3, 250, 9]) for row_settings in VARIETY]
    straight, replayed = [[0] for _ in rows], [[0] for _ in rows]
    for plan, outputs in (((24,), straight), ((9, 15), replayed)):
        for part, steps in enumerate(plan):
            world = World(world_size, VOCAB_SIZE)
            slots = [slot + 7 * part for slot in range(len(rows))]
            for slot, row, known in zip(slots, rows, outputs, strict=True):
                world.admit(slot, Row(row.logits, row.settings, row.prompt, tuple(known)))
            generate(world, slots, outputs, steps)
    assert replayed == straight


def test_generation_is_the_same_at_any_world_size():
    results = []
    for world_size in (1, 2, 4):
        world, outputs = World(world_size, VOCAB_SIZE), [[0] for _ in VARIETY]
        for slot, row_settings in enumerate(VARIETY):
            world.admit(slot, Row(make_logits(0), {**row_settings, "seed": slot}, prompt=[8], outputs=[0]))
        generate(world, list(range(len(VARIETY))), outputs, 20)
        results.append(outputs)
    assert results[0] == results[1] == results[2]
