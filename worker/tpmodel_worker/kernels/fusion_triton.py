"""The CUDA kernels of kernels/fusion.py. None waits for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpmodel_worker.kernels.fusion import HeadNorms
from tpmodel_worker.kernels.launch import KernelLauncher, power_of_two, tiles
from tpmodel_worker.models.batch import LayerKvCache

ACTIVATION_TILE = 1024


def add_and_normalise_rows(
    hidden: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float, *, zero_centred: bool
) -> torch.Tensor:
    """See fusion.add_and_normalise; update contiguous."""
    size = hidden.shape[-1]
    output = torch.empty_like(hidden)
    normalise_row(
        (hidden.numel() // size,),
        *(hidden, hidden if update is None else update, weight, output, eps),
        constants=(size, power_of_two(size), update is not None, zero_centred),
        warps=8 if size > 2048 else 4,
    )
    return output


def gated_normalise_heads(output: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See fusion.gated_normalise."""
    tokens, heads, size = output.shape
    result = torch.empty_like(output)
    gated_head(
        (tokens, heads),
        *(output, gate, weight, result, eps, gate.stride(0), gate.stride(1)),
        constants=(size, power_of_two(size)),
        warps=1,
    )
    return result


def silu_and_multiply_rows(gate_up: torch.Tensor) -> torch.Tensor:
    """See fusion.silu_and_multiply."""
    tokens, features = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((tokens, features), dtype=gate_up.dtype, device=gate_up.device)
    tile = min(ACTIVATION_TILE, power_of_two(features))
    activate((tokens, tiles(features, tile)), gate_up, output, features, constants=(tile,))
    return output


def multiply_heads_by_sigmoid(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See fusion.multiply_by_sigmoid."""
    tokens, heads, size = output.shape
    constants = (size, power_of_two(size))
    sigmoid_head((tokens, heads), output, gate, gate.stride(0), gate.stride(1), constants=constants, warps=1)
    return output


def prepare_heads_in_place(
    projected: torch.Tensor,
    counts: tuple[int, int, int],
    norms: HeadNorms,
    rotation: tuple[torch.Tensor, torch.Tensor],
    cache: LayerKvCache,
    rows: torch.Tensor,
    *,
    gated: bool,
) -> None:
    """See fusion.prepare_heads; queries and keys are changed where they are."""
    tokens, heads, size = projected.shape
    width = 2 if gated else 1
    queries = counts[0] // width
    turned = rotation[0].shape[-1]
    keys = cache.keys
    # A program for each query, each key and each value.
    prepare_head(
        (tokens, queries + 2 * counts[1]),
        *(projected, norms.query, norms.key, *rotation, keys, cache.values, rows, norms.eps),
        *keys.stride()[:3],
        constants=(
            *(heads, counts[0], counts[1], queries, width, size, power_of_two(size), turned, turned // 2),
            *(keys.shape[1], norms.zero_centred),
        ),
        warps=1 if size <= 128 else 2,
    )


@KernelLauncher
@triton.jit
def normalise_row(
    hidden,
    update,
    weight,
    output,
    eps,
    SIZE: tl.constexpr,  # noqa: N803 (constants of the compiled kernel)
    PADDED: tl.constexpr,  # noqa: N803
    ADDS: tl.constexpr,  # noqa: N803
    ZERO_CENTRED: tl.constexpr,  # noqa: N803
):
    """One row."""
    place = tl.arange(0, PADDED)
    inside = place < SIZE
    offset = tl.program_id(0).to(tl.int64) * SIZE + place
    stored = tl.load(hidden + offset, mask=inside, other=0.0)
    if ADDS:
        # Rounded as the stream keeps it, before anything is made of it.
        total = stored.to(tl.float32) + tl.load(update + offset, mask=inside, other=0.0).to(tl.float32)
        stored = total.to(hidden.dtype.element_ty)
        tl.store(hidden + offset, stored, mask=inside)
    row = stored.to(tl.float32)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    if ZERO_CENTRED:
        scale += 1.0
    row *= tl.rsqrt(tl.sum(row * row) / SIZE + eps)
    tl.store(output + offset, (row * scale).to(output.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit
def gated_head(
    output,
    gate,
    weight,
    result,
    eps,
    gate_stride,
    gate_head_stride,
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
):
    """One head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, PADDED)
    inside = place < SIZE
    offset = (token * tl.num_programs(1) + head) * SIZE + place
    row = tl.load(output + offset, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + token * gate_stride + head * gate_head_stride + place, mask=inside, other=0.0)
    opening = opening.to(tl.float32)
    row *= tl.rsqrt(tl.sum(row * row) / SIZE + eps) * scale
    row *= opening / (1.0 + tl.exp(-opening))
    tl.store(result + offset, row.to(result.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit
def activate(gate_up, output, features, TILE: tl.constexpr):  # noqa: N803
    """A tile of one row."""
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = place < features
    gate = tl.load(gate_up + token * 2 * features + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * features + features + place, mask=inside, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(output + token * features + place, result.to(output.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit
def sigmoid_head(
    output,
    gate,
    gate_stride,
    gate_head_stride,
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
):
    """One head of one token."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, PADDED)
    inside = place < SIZE
    offset = (token * tl.num_programs(1) + head) * SIZE + place
    row = tl.load(output + offset, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + token * gate_stride + head * gate_head_stride + place, mask=inside, other=0.0)
    row /= 1.0 + tl.exp(-opening.to(tl.float32))
    tl.store(output + offset, row.to(output.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit
def prepare_head(
    projected,
    query_weight,
    key_weight,
    cosines,
    sines,
    keys,
    values,
    rows,
    eps,
    block_stride,
    slot_stride,
    head_stride,
    HEADS: tl.constexpr,  # noqa: N803
    QUERY_HEADS: tl.constexpr,  # noqa: N803
    KV_HEADS: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    QUERY_WIDTH: tl.constexpr,  # noqa: N803
    SIZE: tl.constexpr,  # noqa: N803
    PADDED: tl.constexpr,  # noqa: N803
    TURNED: tl.constexpr,  # noqa: N803
    HALF: tl.constexpr,  # noqa: N803
    BLOCK_SIZE: tl.constexpr,  # noqa: N803
    ZERO_CENTRED: tl.constexpr,  # noqa: N803
):
    """One query, key or value of one token."""
    token, number = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = tl.arange(0, PADDED)
    inside = place < SIZE
    is_query = number < QUERIES
    # Behind the queries' heads come the keys' and then the values'.
    head = tl.where(is_query, number * QUERY_WIDTH, QUERY_HEADS + number - QUERIES)
    source = projected + (token * HEADS + head) * SIZE
    row = tl.load(rows + token)
    cached = (row // BLOCK_SIZE) * block_stride + (row % BLOCK_SIZE) * slot_stride + place
    if number >= QUERIES + KV_HEADS:
        value = tl.load(source + place, mask=inside, other=0.0)
        tl.store(values + cached + (number - QUERIES - KV_HEADS) * head_stride, value, mask=inside)
    else:
        # Dimension i turns with i + HALF: each is read twice, once as itself and once as the other of its pair.
        other = tl.where(place < HALF, place + HALF, place - HALF)
        turning = place < TURNED
        other = tl.where(turning, other, place)
        vector = tl.load(source + place, mask=inside, other=0.0).to(tl.float32)
        paired = tl.load(source + other, mask=inside & turning, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(vector * vector) / SIZE + eps)
        of_query, of_key = inside & is_query, inside & (number >= QUERIES)
        own_weight = tl.load(query_weight + place, mask=of_query, other=0.0).to(tl.float32)
        own_weight += tl.load(key_weight + place, mask=of_key, other=0.0).to(tl.float32)
        other_weight = tl.load(query_weight + other, mask=of_query & turning, other=0.0).to(tl.float32)
        other_weight += tl.load(key_weight + other, mask=of_key & turning, other=0.0).to(tl.float32)
        if ZERO_CENTRED:
            own_weight += 1.0
            other_weight += 1.0
        # Rounded between norm and rotation, as where these are two steps.
        vector = (vector * scale * own_weight).to(projected.dtype.element_ty).to(tl.float32)
        paired = (paired * scale * other_weight).to(projected.dtype.element_ty).to(tl.float32)
        cosine = tl.load(cosines + token * TURNED + place, mask=turning, other=1.0).to(tl.float32)
        sine = tl.load(sines + token * TURNED + place, mask=turning, other=0.0).to(tl.float32)
        result = (vector * cosine + paired * sine).to(projected.dtype.element_ty)
        tl.debug_barrier()
        tl.store(source + place, result, mask=inside)
        if number >= QUERIES:
            tl.store(keys + cached + (number - QUERIES) * head_stride, result, mask=inside)
