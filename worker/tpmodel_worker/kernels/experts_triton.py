"""Experts of a few tokens on CUDA, as in a decode: three launches, in which every expert finds its tokens itself.

Sorting the tokens by expert, as grouped products need, would take longer than the products do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpmodel_worker.kernels.launch import KernelLauncher, power_of_two, tiles

TOKENS = 16
"""Rows of a product: the least that the matrix units take."""
OUTPUT_TILE = 32
INPUT_TILE = 128
COMBINED_TILE = 1024


def route_rows(logits: torch.Tensor, per_token: int, *, normalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts with the highest probabilities.

    Args:
        logits: (T, experts), contiguous.
        per_token: k.
        normalise: whether the k weights of a token are made to sum to 1.

    Returns:
        (T, k) int64 ids and (T, k) weights in the logits' dtype, the highest first.
    """
    tokens, experts = logits.shape
    ids = torch.empty((tokens, per_token), dtype=torch.int64, device=logits.device)
    weights = torch.empty((tokens, per_token), dtype=logits.dtype, device=logits.device)
    route_row(
        (tokens,),
        *(logits, ids, weights),
        constants=(experts, power_of_two(experts), per_token, power_of_two(per_token), normalise),
        warps=4 if experts > 128 else 1,
    )
    return ids, weights


def mix_few(
    hidden: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    first: int | None,
) -> torch.Tensor:
    """See experts.mix_experts; T * k at most FEW_PAIRS, everything contiguous."""
    tokens, per_token = expert_ids.shape
    experts, hidden_size, features = down.shape
    pairs = tokens * per_token
    inner = torch.empty((pairs, features), dtype=hidden.dtype, device=hidden.device)
    # Pairs whose expert is elsewhere are written by nobody.
    empty = torch.empty if first is None else torch.zeros
    outputs = empty((tokens, per_token, hidden_size), dtype=hidden.dtype, device=hidden.device)
    common = (per_token, power_of_two(max(pairs, TOKENS)), TOKENS, OUTPUT_TILE)
    sizes = (pairs, first or 0, hidden_size, features)
    activate_experts(
        (experts, tiles(features, OUTPUT_TILE)),
        *(hidden, expert_ids, gate_up, inner, *sizes),
        constants=(*common, _input_tile(hidden_size)),
    )
    project_experts(
        (experts, tiles(hidden_size, OUTPUT_TILE)),
        *(inner, expert_ids, expert_weights, down, outputs, *sizes),
        constants=(*common, _input_tile(features)),
    )
    return outputs.sum(1)


def combine_rows(
    outputs: torch.Tensor, order: torch.Tensor, weights: torch.Tensor, *, reached: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of each token's experts' outputs, which lie sorted by expert.

    Args:
        outputs: (T * k, hidden size), contiguous; the rows from `reached` on hold nothing.
        order: (T * k,) int64, which pair of token and expert each row is of.
        weights: (T, k), contiguous.
        reached: () int64, how many rows products have reached.

    Returns:
        (T, hidden size) in outputs' dtype, added in float32 in the order of each token's experts.
    """
    tokens, per_token = weights.shape
    rows = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    hidden_size = outputs.shape[1]
    combined = torch.empty((tokens, hidden_size), dtype=outputs.dtype, device=outputs.device)
    tile = min(COMBINED_TILE, power_of_two(hidden_size))
    combine_row(
        (tokens, tiles(hidden_size, tile)),
        *(outputs, rows, weights, reached, combined, hidden_size),
        constants=(per_token, tile),
    )
    return combined


def _input_tile(size: int) -> int:
    return min(INPUT_TILE, max(16, power_of_two(size)))


@KernelLauncher
@triton.jit
def route_row(
    logits,
    ids,
    weights,
    EXPERTS: tl.constexpr,  # noqa: N803 (constants of the compiled kernel)
    PADDED: tl.constexpr,  # noqa: N803
    CHOSEN: tl.constexpr,  # noqa: N803
    CHOSEN_PADDED: tl.constexpr,  # noqa: N803
    NORMALISE: tl.constexpr,  # noqa: N803
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, PADDED)
    inside = place < EXPERTS
    row = tl.load(logits + token * EXPERTS + place, mask=inside, other=-float("inf")).to(tl.float32)
    row = tl.exp(row - tl.max(row))
    row = tl.where(inside, row / tl.sum(row), -1.0)
    rank = tl.arange(0, CHOSEN_PADDED)
    chosen = tl.zeros([CHOSEN_PADDED], dtype=tl.int64)
    shares = tl.zeros([CHOSEN_PADDED], dtype=tl.float32)
    for number in tl.static_range(CHOSEN):  # pyright: ignore[reportGeneralTypeIssues] (unrolled by the compiler)
        best = tl.argmax(row, 0)
        chosen = tl.where(rank == number, best.to(tl.int64), chosen)
        shares = tl.where(rank == number, tl.max(row), shares)
        row = tl.where(place == best, -1.0, row)
    if NORMALISE:
        shares /= tl.sum(shares)
    wanted = rank < CHOSEN
    tl.store(ids + token * CHOSEN + rank, chosen, mask=wanted)
    tl.store(weights + token * CHOSEN + rank, shares.to(weights.dtype.element_ty), mask=wanted)


# Numbers that change from step to step must not make new kernels.
@KernelLauncher
@triton.jit(do_not_specialize=["pairs", "first"])
def activate_experts(
    hidden,
    ids,
    gate_up,
    inner,
    pairs,
    first,
    hidden_size,
    features,
    CHOSEN: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
):
    """silu(gate(x)) * up(x) of one expert's tokens, a tile of features."""
    expert = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    wanted = feature < features
    index = tl.arange(0, PAIRS)
    mine = tl.load(ids + index, mask=index < pairs, other=-1) == expert + first
    count = tl.sum(mine.to(tl.int32))
    order = tl.cumsum(mine.to(tl.int32), 0) - 1
    column = tl.arange(0, INPUTS)
    gates = gate_up + (expert * 2 * features + feature) * hidden_size
    ups = gates + features * hidden_size
    for start in range(0, count, TOKENS):
        row = start + tl.arange(0, TOKENS)
        here = row < count
        pair = tl.sum(tl.where(mine[None, :] & (order[None, :] == row[:, None]), index[None, :], 0), 1)
        token = (pair // CHOSEN).to(tl.int64)
        gate = tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32)
        up = tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32)
        for begin in range(0, hidden_size, INPUTS):
            at = begin + column
            inside = at < hidden_size
            rows = tl.load(
                hidden + token[:, None] * hidden_size + at[None, :], mask=here[:, None] & inside[None, :], other=0.0
            )
            both = inside[:, None] & wanted[None, :]
            gate = tl.dot(rows, tl.load(gates[None, :] + at[:, None], mask=both, other=0.0), gate, "ieee")
            up = tl.dot(rows, tl.load(ups[None, :] + at[:, None], mask=both, other=0.0), up, "ieee")
        result = (gate / (1.0 + tl.exp(-gate)) * up).to(inner.dtype.element_ty)
        place = inner + pair.to(tl.int64)[:, None] * features + feature[None, :]
        tl.store(place, result, mask=here[:, None] & wanted[None, :])


@KernelLauncher
@triton.jit(do_not_specialize=["pairs", "first"])
def project_experts(
    inner,
    ids,
    weights,
    down,
    outputs,
    pairs,
    first,
    hidden_size,
    features,
    CHOSEN: tl.constexpr,  # noqa: N803
    PAIRS: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
    OUTPUTS: tl.constexpr,  # noqa: N803
    INPUTS: tl.constexpr,  # noqa: N803
):
    """down(inner) times its weight, of one expert's tokens, a tile of the hidden size."""
    expert = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    wanted = feature < hidden_size
    index = tl.arange(0, PAIRS)
    mine = tl.load(ids + index, mask=index < pairs, other=-1) == expert + first
    count = tl.sum(mine.to(tl.int32))
    order = tl.cumsum(mine.to(tl.int32), 0) - 1
    column = tl.arange(0, INPUTS)
    downs = down + (expert * hidden_size + feature) * features
    for start in range(0, count, TOKENS):
        row = start + tl.arange(0, TOKENS)
        here = row < count
        pair = tl.sum(tl.where(mine[None, :] & (order[None, :] == row[:, None]), index[None, :], 0), 1).to(tl.int64)
        total = tl.zeros([TOKENS, OUTPUTS], dtype=tl.float32)
        for begin in range(0, features, INPUTS):
            at = begin + column
            inside = at < features
            rows = tl.load(
                inner + pair[:, None] * features + at[None, :], mask=here[:, None] & inside[None, :], other=0.0
            )
            both = inside[:, None] & wanted[None, :]
            total = tl.dot(rows, tl.load(downs[None, :] + at[:, None], mask=both, other=0.0), total, "ieee")
        share = tl.load(weights + pair, mask=here, other=0.0).to(tl.float32)
        result = (total * share[:, None]).to(outputs.dtype.element_ty)
        place = outputs + pair[:, None] * hidden_size + feature[None, :]
        tl.store(place, result, mask=here[:, None] & wanted[None, :])


@KernelLauncher
@triton.jit
def combine_row(
    outputs,
    rows,
    weights,
    reached,
    combined,
    hidden_size,
    CHOSEN: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """One token, a tile of the hidden size."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < hidden_size
    end = tl.load(reached)
    total = tl.zeros([TILE], dtype=tl.float32)
    for number in tl.static_range(CHOSEN):  # pyright: ignore[reportGeneralTypeIssues] (unrolled by the compiler)
        row = tl.load(rows + token * CHOSEN + number)
        share = tl.load(weights + token * CHOSEN + number).to(tl.float32)
        output = tl.load(outputs + row * hidden_size + column, mask=inside & (row < end), other=0.0)
        total += share * output.to(tl.float32)
    tl.store(combined + token * hidden_size + column, total.to(combined.dtype.element_ty), mask=inside)
