"""Products of a mixture of experts: every token with the few experts that it was routed to.

On CUDA a few tokens take kernels of their own (experts_triton). Else tokens are sorted by expert, so that each expert's
weights are read once and meet all their tokens in one product.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.fusion import silu_and_multiply
from tpmodel_worker.kernels.linear import linear

FEW_PAIRS = 512
"""Tokens times their experts that experts_triton takes, which looks through all of them for each expert."""
_GROUPED_ALIGNMENT = 8
"""torch's grouped product on CUDA takes bfloat16 rows of a multiple of 16 bytes."""


def mix_experts(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int | None = None,
) -> torch.Tensor:
    """The sum over a token's experts of weight * down(silu(gate(x)) * up(x)).

    Args:
        hidden: (T, hidden size).
        expert_ids: (T, k) int64, the experts of each token, no expert twice.
        expert_weights: (T, k), what each expert's output counts, in hidden's dtype.
        gate_up: (experts, 2 * features, hidden size), of each expert the gate's rows, then those of up.
        down: (experts, hidden size, features).
        first: the id of the first of these experts, where others are elsewhere: those add nothing. None: these are all.

    Returns:
        (T, hidden size) in hidden's dtype. The k outputs of a token are added in the order of expert_ids, so that no
        other token changes the result. On CUDA nothing waits for the device in 16 bits, and with few tokens.
    """
    tokens, per_token = expert_ids.shape
    if hidden.is_cuda and tokens * per_token <= FEW_PAIRS:
        from tpmodel_worker.kernels.experts_triton import mix_few

        return mix_few(hidden, expert_ids, expert_weights, gate_up, down, first=first)
    experts = gate_up.shape[0]
    places = expert_ids.flatten()
    if first is not None:
        # Rows of experts that are not here come last, where no product reaches.
        places = places - first
        places = torch.where((places >= 0) & (places < experts), places, experts)
    order = places.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=places.device)
    counts = counts.scatter_add_(0, places, torch.ones_like(places))[:experts]
    rows = hidden.index_select(0, order // per_token)
    if can_group(hidden, gate_up, down):
        outputs = multiply_grouped(rows, counts, gate_up, down)
    else:
        outputs = multiply_looped(rows, counts, gate_up, down)
    if outputs.is_cuda:
        from tpmodel_worker.kernels.experts_triton import combine_rows

        return combine_rows(outputs, order, expert_weights, reached=counts.sum())
    outputs *= expert_weights.flatten().index_select(0, order).unsqueeze(1)
    if first is not None:
        # What is in the last rows is no number that anything computed.
        outputs.masked_fill_((places.index_select(0, order) == experts).unsqueeze(1), 0)
    sorted_back = torch.empty_like(outputs).index_copy_(0, order, outputs)
    return sorted_back.unflatten(0, (tokens, per_token)).sum(1)


def route(logits: torch.Tensor, per_token: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the highest probabilities.

    Args:
        logits: (T, experts), contiguous.
        per_token: k.
        normalise: whether the k weights of a token are made to sum to 1.

    Returns:
        (T, k) int64 ids and (T, k) weights in the logits' dtype; computed in float32.
    """
    if logits.is_cuda:
        from tpmodel_worker.kernels.experts_triton import route_rows

        return route_rows(logits, per_token, normalise=normalise)
    weights, ids = logits.softmax(dim=-1, dtype=torch.float32).topk(per_token, dim=-1)
    if normalise:
        weights /= weights.sum(dim=-1, keepdim=True)
    return ids, weights.to(logits.dtype)


def can_group(hidden: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether torch has one kernel for all experts' products: on CUDA, in bfloat16, with aligned rows."""
    aligned = gate_up.shape[-1] % _GROUPED_ALIGNMENT == 0 and down.shape[-1] % _GROUPED_ALIGNMENT == 0
    return hidden.is_cuda and hidden.dtype == torch.bfloat16 and aligned


def multiply_grouped(
    rows: torch.Tensor, counts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """The experts' outputs for rows sorted by expert: (T * k, hidden size); the row counts stay on the device.

    What rows after the last expert's get is not said.
    """
    ends = counts.cumsum(0).to(torch.int32)
    inner = silu_and_multiply(F.grouped_mm(rows, gate_up.transpose(1, 2), offs=ends))
    return F.grouped_mm(inner, down.transpose(1, 2), offs=ends)


def multiply_looped(
    rows: torch.Tensor, counts: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """As multiply_grouped, one product for each expert that has tokens; the counts are read on the host."""
    outputs = torch.empty_like(rows)
    for expert, start, end in _groups(counts.tolist()):
        inner = silu_and_multiply(linear(rows[start:end], gate_up[expert]))
        outputs[start:end] = linear(inner, down[expert])
    return outputs


def _groups(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """(expert, first row, end) of each expert with rows."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
            start += count
