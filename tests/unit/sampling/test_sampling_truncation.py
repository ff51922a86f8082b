"""Which tokens top_k, top_p and min_p keep: against transformers, and against a sort where scores are tied."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from support.sampling_world import World
from tpmodel_worker.rank.truncation import ShardedLimits, truncate

NO_IDS = torch.empty(1, 0, dtype=torch.int64)


def kept_ids(
    logits: torch.Tensor, world_size: int, *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> set[int]:
    """What the sharded search leaves of one row, whose length is a multiple of world_size."""
    limits = ShardedLimits(
        rows=slice(0, 1),
        top_k=torch.tensor([[top_k]]) if top_k else None,
        top_p=torch.tensor([[top_p]], dtype=torch.float64) if top_p < 1 else None,
        log_min_p=torch.tensor([[min_p]], dtype=torch.float64).log() if min_p else None,
    )
    world = World(world_size, len(logits))
    shards = [shard.clone().unsqueeze(0) for shard in logits.chunk(world_size)]
    world.on_every_rank(lambda rank: truncate(shards[rank], limits, world.communicators[rank]))
    return set(torch.cat(shards, dim=1)[0].isfinite().nonzero().flatten().tolist())


def survivors(scores: torch.Tensor) -> set[int]:
    return set(scores[0].isfinite().nonzero().flatten().tolist())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_single_limits_keep_what_transformers_keeps(seed: int, world_size: int):
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(seed)) * 4
    row = logits.unsqueeze(0)
    assert kept_ids(logits, world_size, top_k=1500) == survivors(TopKLogitsWarper(1500)(NO_IDS, row))  # type: ignore[arg-type]
    assert kept_ids(logits, world_size, top_p=0.8) == survivors(TopPLogitsWarper(0.8)(NO_IDS, row))  # type: ignore[arg-type]
    assert kept_ids(logits, world_size, min_p=0.01) == survivors(MinPLogitsWarper(0.01)(NO_IDS, row))  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [1, 4])
def test_limits_in_their_order_keep_what_transformers_keeps(world_size: int):
    logits = torch.randn(4096, generator=torch.Generator().manual_seed(11)) * 2
    row = logits.unsqueeze(0)
    for warper in (TopKLogitsWarper(1300), TopPLogitsWarper(0.7), MinPLogitsWarper(0.05)):
        row = warper(NO_IDS, row)  # type: ignore[arg-type]
    assert kept_ids(logits, world_size, top_k=1300, top_p=0.7, min_p=0.05) == survivors(row)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(1, 6),
    world_size=st.sampled_from([1, 2, 4]),
    top_k=st.integers(1, 511),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999]),
)
def test_tied_scores_are_kept_from_the_lowest_id_on(seed: int, levels: int, world_size: int, top_k: int, top_p: float):
    """Few different scores, so that nearly every border runs through a tie."""
    logits = torch.randint(0, levels, (512,), generator=torch.Generator().manual_seed(seed)).float() - 2.5
    order = torch.argsort(logits, descending=True, stable=True)
    assert kept_ids(logits, world_size, top_k=top_k) == set(order[:top_k].tolist())
    weights = ((logits[order].double() - logits.max()).exp() * 2**40).round().to(torch.int64)
    before = weights.cumsum(0) - weights
    target = max(1, int(torch.ceil(weights.sum() * torch.tensor(top_p, dtype=torch.float64))))
    assert kept_ids(logits, world_size, top_p=top_p) == set(order[before < target].tolist())


def test_top_p_of_equal_tokens_keeps_the_exact_share():
    """Sums of rounded probabilities would keep one token more or less here, depending on their order."""
    for world_size in (1, 2, 4):
        assert kept_ids(torch.full((1024,), -3.3), world_size, top_p=0.5) == set(range(512))


def test_the_most_likely_token_always_stays():
    logits = torch.tensor([0.0, 5.0, 5.0] + [-1.0] * 61)
    assert kept_ids(logits, 1, top_p=1e-12) == {1}
    assert kept_ids(logits, 1, min_p=1.0) == {1, 2}
    assert kept_ids(logits, 1, top_k=1, top_p=1e-12, min_p=1.0) == {1}
