"""Log-probabilities over shards, against torch.log_softmax of the whole row."""

from __future__ import annotations

import pytest
import torch

from support.sampling_world import Row, World
from tpmodel_worker.rank.logprobs import SampledLogprobs


def sample(world: World, rows: list[Row]) -> tuple[list[int], SampledLogprobs | None]:
    for slot, row in enumerate(rows):
        world.admit(slot, row)
    logits = torch.stack([row.logits for row in rows])
    result = world.sample(logits, range(len(rows)), [len(row.outputs) for row in rows])
    return result.token_ids.tolist(), result.logprobs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_logprobs_are_those_of_the_raw_logits(world_size: int):
    """Neither penalties nor temperature nor limits change them."""
    generator = torch.Generator().manual_seed(9)
    rows = [
        Row(
            torch.randn(500, generator=generator) * 5,
            {"temperature": 1.5, "top_k": 50, "seed": seed, "repetition_penalty": 2.0, "logprobs": count},
            prompt=list(range(100)),
        )
        for seed, count in enumerate([20, 0, 5])
    ]
    tokens, logprobs = sample(World(world_size, 500), rows)
    assert logprobs is not None
    assert logprobs.rows == (0, 1, 2)
    assert logprobs.counts == (20, 0, 5)
    for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
        exact = torch.log_softmax(row.logits.double(), dim=0)
        best = exact.topk(20)
        assert float(logprobs.chosen[index]) == pytest.approx(float(exact[token]), rel=1e-6)
        assert logprobs.top_ids[index].tolist() == best.indices.tolist()
        torch.testing.assert_close(logprobs.top_values[index].double(), best.values, rtol=1e-6, atol=1e-6)


def test_only_rows_that_ask_are_computed_and_only_as_many_as_asked():
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    _, logprobs = sample(World(2, 200), [Row(logits[0]), Row(logits[1], {"logprobs": 3}), Row(logits[2])])
    assert logprobs is not None
    assert logprobs.rows == (1,)
    assert logprobs.chosen.shape == (1,)
    assert logprobs.top_ids.shape == logprobs.top_values.shape == (1, 3)


def test_a_batch_in_which_no_row_asks_has_none():
    world = World(2, 200)
    _, logprobs = sample(world, [Row(torch.zeros(200))])
    assert logprobs is None
    assert world.communicators[0].gathers == 1


def test_zero_logprobs_give_the_chosen_token_alone():
    logits = torch.zeros(200)
    logits[7] = 3.0
    tokens, logprobs = sample(World(2, 200), [Row(logits, {"logprobs": 0})])
    assert logprobs is not None
    assert tokens == [7]
    assert float(logprobs.chosen[0]) == pytest.approx(float(torch.log_softmax(logits, dim=0)[7]), rel=1e-6)
    assert logprobs.top_ids.shape == (1, 0)


def test_equal_logprobs_come_by_ascending_id():
    logits = torch.full((200,), -1.0)
    logits[[150, 3, 199, 70]] = 2.0
    _, logprobs = sample(World(4, 200), [Row(logits, {"logprobs": 6})])
    assert logprobs is not None
    assert logprobs.top_ids.tolist() == [[3, 70, 150, 199, 0, 1]]


def test_a_vocabulary_smaller_than_the_count_gives_all_its_tokens():
    _, logprobs = sample(World(2, 10), [Row(torch.arange(10.0), {"logprobs": 20})])
    assert logprobs is not None
    assert logprobs.top_ids.tolist() == [list(range(9, -1, -1))]
    assert logprobs.counts == (10,)
