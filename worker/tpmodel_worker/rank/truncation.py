"""top_k, top_p and min_p, exact over vocabulary shards.

Probabilities enter as integers: exp(score - largest score) in units of 2^-40. Sums of integers have no
rounding, so the tokens kept do not depend on the order of summation, which differs between world sizes,
devices and batches. Equal scores are taken in the order of their ids.

Two ways lead to the same tokens. Rows with a small top_k gather their candidates (`sample_candidates`). All
others find the smallest score kept by a radix search over histograms (`truncate`), which moves a few KiB for
each row where its logits would be megabytes, and leaves the row sharded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.gumbel_noise import NoiseKeys, gumbel_noise_at
from tpmodel_worker.rank.token_keys import (
    key_ids,
    key_values,
    merge_top_keys,
    ordered_bits,
    pack_keys,
    row_blocks,
    top_keys,
)

_UNIT = 2.0**40
"""Weight of the most likely token. 2^22 such tokens still add up within 63 bits."""
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""Shift and width of the parts in which the radix search goes through the 32 bits of a score."""
_BINS = 1 << 11
"""Bins of the widest of these histograms."""


@dataclass(frozen=True, slots=True)
class ShardedLimits:
    """How rows that stay sharded are truncated; N rows, all using the same kinds of limit."""

    rows: slice
    """Rows of the scores."""
    top_k: torch.Tensor | None
    """(N, 1) int64, below the size of the vocabulary."""
    top_p: torch.Tensor | None
    """(N, 1) float64, below 1."""
    log_min_p: torch.Tensor | None
    """(N, 1) float64, the logarithm; -inf: off."""


@dataclass(frozen=True, slots=True)
class CandidateLimits:
    """How rows with a small top_k are truncated; N rows."""

    rows: slice
    """Rows of the scores."""
    count: int
    """The largest top_k."""
    top_k: torch.Tensor
    """(N, 1) int64."""
    top_p: torch.Tensor
    """(N, 1) float64, 1: off."""
    log_min_p: torch.Tensor
    """(N, 1) float64, the logarithm; -inf: off."""


def truncate(scores: torch.Tensor, limits: ShardedLimits, communicator: Communicator) -> None:
    """Sets what the limits drop to -inf, in place.

    Args:
        scores: (P, vocab_shard) float32, penalties and temperature applied.
        limits: for the rows limits.rows of it.
        communicator: called the same number of times on every rank.
    """
    rows = scores[limits.rows]
    for block in row_blocks(rows.shape[0], max(rows.shape[1], _BINS), rows.device):
        part = rows[block]
        peaks = communicator.all_gather(part.amax(dim=-1, keepdim=True)).amax(dim=0)
        distance = part.to(torch.float64) - peaks.to(torch.float64)
        keep = torch.ones_like(part, dtype=torch.bool)
        if limits.top_k is not None:
            top_k = limits.top_k[block]
            keep = _keep_largest(part, keep.to(torch.int64), lambda _, k=top_k: k, communicator)
        if limits.top_p is not None:
            top_p = limits.top_p[block]
            weights = _weights(distance) * keep
            keep &= _keep_largest(part, weights, lambda total, p=top_p: _nucleus(total, p), communicator)
        if limits.log_min_p is not None:
            keep &= distance >= limits.log_min_p[block]
        part.masked_fill_(~keep, -torch.inf)


def sample_candidates(
    scores: torch.Tensor, limits: CandidateLimits, keys: NoiseKeys, first_id: int, communicator: Communicator
) -> torch.Tensor:
    """Samples rows with a small top_k.

    Args:
        scores: (P, vocab_shard) float32, penalties and temperature applied.
        limits: for the N rows limits.rows of it.
        keys: of the noise of these N rows.
        first_id: the vocabulary id of column 0.
        communicator: called once.

    Returns:
        (N,) int64 token ids.
    """
    gathered = communicator.all_gather(top_keys(scores[limits.rows], first_id, limits.count))
    best = merge_top_keys(gathered, limits.count)
    values, ids = key_values(best), key_ids(best)
    distance = values.to(torch.float64) - values[:, :1].to(torch.float64)
    keep = torch.arange(best.shape[1], device=best.device) < limits.top_k
    weights = _weights(distance) * keep
    covered = weights.cumsum(dim=1)
    keep &= (limits.top_p >= 1) | (covered - weights < _nucleus(covered[:, -1:], limits.top_p))
    keep &= distance >= limits.log_min_p
    noisy = values.masked_fill(~keep, -torch.inf) + gumbel_noise_at(keys, ids)
    return key_ids(pack_keys(noisy, ids).amax(dim=1))


def _weights(distance: torch.Tensor) -> torch.Tensor:
    """Integer weights of tokens, int64, from their distance (float64, at most 0) to the largest score."""
    return (distance.exp() * _UNIT).round_().to(torch.int64)


def _nucleus(total: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The weight that top_p asks for, of the total: a token is kept while less than this lies before it."""
    return (total * top_p).ceil_().to(torch.int64).clamp_(min=1)


def _keep_largest(
    scores: torch.Tensor,
    weights: torch.Tensor,
    target_of: Callable[[torch.Tensor], torch.Tensor],
    communicator: Communicator,
) -> torch.Tensor:
    """Goes down each row from its largest score, keeping tokens until the target weight is reached.

    Args:
        scores: (N, vocab_shard) float32.
        weights: (N, vocab_shard) int64, at least 0; of equal scores equal or 0.
        target_of: total weight (N, 1) of all shards to the target (N, 1), 1 to the total.
        communicator: called four times.

    Returns:
        (N, vocab_shard) bool: the tokens before which, over all shards, less than the target lies.
    """
    levels = ordered_bits(scores) + 2**31
    threshold = torch.zeros_like(levels[:, :1])
    target = None
    inside = weights
    for shift, width in _DIGITS:
        bins = 1 << width
        digits = (levels >> shift) & (bins - 1)
        histogram = torch.zeros(levels.shape[0], bins, dtype=torch.int64, device=levels.device)
        histogram.scatter_add_(1, digits, inside)
        histogram = communicator.all_gather(histogram).sum(dim=0).flip(1)  # largest digit first
        covered = histogram.cumsum(dim=1)
        if target is None:
            target = target_of(covered[:, -1:])
        place = (covered < target).sum(dim=1, keepdim=True).clamp_(max=bins - 1)
        target = target - (covered - histogram).gather(1, place)
        digit = bins - 1 - place
        threshold |= digit << shift
        inside = inside * (digits == digit)
    assert target is not None
    # What is left inside has the threshold's score. Lower ids go first, so the ranks before this one do.
    shares = communicator.all_gather(inside.sum(dim=1, keepdim=True))
    before = inside.cumsum(dim=1) - inside + shares[: communicator.rank].sum(dim=0)
    return (levels > threshold) | ((levels == threshold) & (before < target))
