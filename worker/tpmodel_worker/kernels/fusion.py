"""What lies between the products of a layer, each in one launch on CUDA: there a step of few tokens costs its launches.

On the CPU the same in plain torch, which is the reference.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.kv_cache import write_kv
from tpmodel_worker.models.batch import LayerKvCache


def add_and_normalise(
    hidden: torch.Tensor, update: torch.Tensor | None, weight: torch.Tensor, eps: float, *, zero_centred: bool
) -> torch.Tensor:
    """Adds update to the residual stream in place, and divides by the root of the mean square of the last dimension.

    Args:
        hidden: (T, size), contiguous; added to.
        update: as hidden; None: nothing is added.
        weight: (size,), what the result is scaled by.
        eps: added to the mean square.
        zero_centred: scales by 1 + weight instead.

    Returns:
        (T, size) in hidden's dtype; mean and scale are computed in float32.
    """
    if hidden.is_cuda:
        from tpmodel_worker.kernels.fusion_triton import add_and_normalise_rows

        return add_and_normalise_rows(hidden, update, weight, eps, zero_centred=zero_centred)
    if update is not None:
        hidden += update
    if zero_centred:
        return F.rms_norm(hidden.float(), weight.shape, weight.float() + 1.0, eps).to(hidden.dtype)
    return F.rms_norm(hidden, weight.shape, weight, eps)


def gated_normalise(output: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Each head's output by the root of its mean square, times weight, times SiLU of its gate.

    Args:
        output: (T, heads, size), contiguous.
        gate: as output, neighbours of a row contiguous.
        weight: (size,).
        eps: added to the mean square.

    Returns:
        (T, heads, size) in output's dtype.
    """
    if output.is_cuda:
        from tpmodel_worker.kernels.fusion_triton import gated_normalise_heads

        return gated_normalise_heads(output, gate, weight, eps)
    normalised = F.rms_norm(output, weight.shape, weight, eps)
    return (normalised * F.silu(gate.float())).to(output.dtype)


def silu_and_multiply(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU of the first half of the last dimension times the second: (T, 2 * features), contiguous -> (T, features)."""
    if gate_up.is_cuda:
        from tpmodel_worker.kernels.fusion_triton import silu_and_multiply_rows

        return silu_and_multiply_rows(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def multiply_by_sigmoid(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """output * sigmoid(gate), in place: (T, heads, size), contiguous; gate alike, neighbours of a head contiguous."""
    if output.is_cuda:
        from tpmodel_worker.kernels.fusion_triton import multiply_heads_by_sigmoid

        return multiply_heads_by_sigmoid(output, gate)
    return output.mul_(gate.sigmoid())


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """How queries and keys are normalised."""

    query: torch.Tensor
    """(head_dim,), what normalised queries are scaled by."""
    key: torch.Tensor
    """As query, of keys."""
    eps: float
    zero_centred: bool
    """Whether the scale is 1 + weight."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What attention takes, by token and head; the last two dimensions' neighbours need not lie side by side."""

    query: torch.Tensor
    """(T, heads, head_dim), normalised and rotated."""
    key: torch.Tensor
    """(T, kv_heads, head_dim), normalised and rotated."""
    value: torch.Tensor
    """As key, but as projected."""
    gate: torch.Tensor | None
    """As query, but as projected; None where there are none."""


def prepare_heads(
    projected: torch.Tensor,
    counts: tuple[int, int, int],
    norms: HeadNorms,
    rotation: tuple[torch.Tensor, torch.Tensor],
    cache: LayerKvCache,
    rows: torch.Tensor,
    *,
    gated: bool,
) -> Heads:
    """Normalises and rotates queries and keys, and stores keys and values in the cache.

    Args:
        projected: (T, sum of counts, head_dim), contiguous: queries (gated: each followed by its gate), keys, values.
            May be overwritten.
        counts: heads of each of the three.
        norms: of queries and keys.
        rotation: what RotaryEmbedding computed.
        cache: one layer's.
        rows: (T,) int64, block * block_size + offset.
        gated: whether every other head of the queries is a gate.
    """
    queries, key, value = projected.split(counts, dim=1)
    query, gate = (queries[:, ::2], queries[:, 1::2]) if gated else (queries, None)
    if projected.is_cuda:
        from tpmodel_worker.kernels.fusion_triton import prepare_heads_in_place

        prepare_heads_in_place(projected, counts, norms, rotation, cache, rows, gated=gated)
        return Heads(query, key, value, gate)
    query = rotate(_normalise(query, norms.query, norms), *rotation)
    key = rotate(_normalise(key, norms.key, norms), *rotation)
    write_kv(key, value, cache, rows)
    return Heads(query, key, value, gate)


def _normalise(vectors: torch.Tensor, weight: torch.Tensor, norms: HeadNorms) -> torch.Tensor:
    if norms.zero_centred:
        return F.rms_norm(vectors.float(), weight.shape, weight.float() + 1.0, norms.eps).to(vectors.dtype)
    return F.rms_norm(vectors, weight.shape, weight, norms.eps)


def rotate(vectors: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """(T, heads, head_dim) turned by what RotaryEmbedding computed for their positions."""
    turned = cosines.shape[-1]
    if turned < vectors.shape[-1]:
        return torch.cat((rotate(vectors[..., :turned], cosines, sines), vectors[..., turned:]), dim=-1)
    return torch.addcmul(vectors * cosines, vectors.roll(vectors.shape[-1] // 2, -1), sines)
