"""Greedy rows: the arg-max of the logits, ties to the lower id, for the price of one small gather."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.sampling_world import Row, World


def tied_logits(vocab_size: int, ids: Sequence[int], value: float = 1.0) -> torch.Tensor:
    logits = torch.full((vocab_size,), -5.0)
    logits[list(ids)] = value
    return logits


@settings(max_examples=50, deadline=None)
@given(
    ids=st.sets(st.integers(0, 299), min_size=1),
    world_size=st.sampled_from([1, 2, 4]),
    value=st.sampled_from([2.0, -1.0]),
)
def test_ties_go_to_the_lower_id_across_shards(ids: set[int], world_size: int, value: float):
    assert World(world_size, 300).sample_rows([Row(tied_logits(300, sorted(ids), value))]) == [min(ids)]


def test_zero_and_negative_zero_are_equal():
    logits = tied_logits(300, [10], value=-0.0)
    logits[200] = 0.0
    assert World(4, 300).sample_rows([Row(logits)]) == [10]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_greedy_batch_gathers_once_and_draws_no_noise(world_size: int, monkeypatch: pytest.MonkeyPatch):
    def no_noise(*_: object) -> torch.Tensor:
        raise AssertionError("a greedy batch needs no noise")

    monkeypatch.setattr("tpmodel_worker.rank.sampling.gumbel_noise", no_noise)
    world = World(world_size, 1000)
    logits = torch.randn(8, 1000, generator=torch.Generator().manual_seed(1))
    for slot in range(8):
        world.admit(slot, Row(logits[slot], {"top_k": 5, "top_p": 0.5, "min_p": 0.1}))
    tokens = world.sample(logits, range(8), [0] * 8).token_ids
    assert torch.equal(tokens, logits.argmax(dim=1))
    assert [communicator.gathers for communicator in world.communicators] == [1] * world_size


@pytest.mark.parametrize("vocab_size", [65, 100, 130, 257])
@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 5.0}, {"temperature": 5.0, "top_k": 90}, {"temperature": 5.0, "top_p": 0.999}]
)
def test_padding_is_never_chosen(vocab_size: int, settings: dict[str, float]):
    """At these sizes the last shards are partly or wholly padding, -inf there."""
    logits = torch.full((vocab_size,), -50.0)
    rows = [Row(logits, {**settings, "seed": seed, "logprobs": 20}) for seed in range(20)]
    tokens = World(4, vocab_size).sample_rows(rows)
    assert all(token < vocab_size for token in tokens)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_a_row_with_nothing_left_gives_the_lowest_id(settings: dict[str, float]):
    logits = torch.full((200,), -torch.inf)
    assert World(2, 200).sample_rows([Row(logits, settings)]) == [0]


def test_greedy_rows_of_a_mixed_batch_are_untouched_by_their_company():
    generator = torch.Generator().manual_seed(3)
    rows = [
        Row(torch.randn(300, generator=generator), {"temperature": 3.0, "seed": index} if index % 2 else {})
        for index in range(9)
    ]
    tokens = World(2, 300).sample_rows(rows)
    assert tokens[::2] == [int(row.logits.argmax()) for row in rows[::2]]
