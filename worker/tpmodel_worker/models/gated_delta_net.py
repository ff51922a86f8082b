"""Gated DeltaNet: linear attention with a recurrent state, split by key-head group.

A rank holds some key heads and the value heads that belong to them: its part of every projection, of the convolution
and of the state. Only the output projection exchanges anything, by one all-reduce.
"""

from __future__ import annotations

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.fusion import gated_normalise
from tpmodel_worker.kernels.gated_delta import DeltaGates, GatedDelta
from tpmodel_worker.kernels.linear import linear
from tpmodel_worker.models.batch import LayerState, StateShape
from tpmodel_worker.models.config_types import LinearAttentionConfig
from tpmodel_worker.models.layers import RmsNorm, RowParallelLinear
from tpmodel_worker.models.sharding import ShardedModule, TensorPart, divide, empty_weight


class GatedDeltaNet(nn.Module):
    """One linear-attention layer; this rank's heads."""

    def __init__(
        self,
        linear_attention: LinearAttentionConfig,
        hidden_size: int,
        eps: float,
        communicator: Communicator,
        *,
        interleaved: bool,
        dtype: torch.dtype,
    ) -> None:
        """interleaved: how the checkpoint stores the projections, see DeltaProjection."""
        super().__init__()
        heads = DeltaHeads(linear_attention, communicator)
        self.heads = heads
        self.in_proj = DeltaProjection(heads, hidden_size, interleaved=interleaved, dtype=dtype)
        self.conv1d = DeltaConvolution(heads, dtype=dtype)
        # Published in float32, which is what the decay is computed in.
        self.A_log = PerHead(heads)
        self.dt_bias = PerHead(heads)
        self.norm = GatedRmsNorm(heads.value_dim, eps, dtype=dtype)
        self.out_proj = RowParallelLinear(linear_attention.value_features, hidden_size, communicator, dtype=dtype)

    def forward(self, hidden: torch.Tensor, state: LayerState, delta: GatedDelta) -> torch.Tensor:
        """(T, hidden size) -> the same; moves the sequences' state on."""
        heads = self.heads
        features, gate, beta, step = self.in_proj(hidden).split(heads.projected, dim=-1)
        query, key, value = delta.convolve(features, self.conv1d.weight, state).split(heads.convolved, dim=-1)
        gates = DeltaGates(step, beta, step_bias=self.dt_bias.weight, log_decay=self.A_log.weight)
        output = delta.attend(
            query.unflatten(-1, (-1, heads.key_dim)),
            key.unflatten(-1, (-1, heads.key_dim)),
            value.unflatten(-1, (-1, heads.value_dim)),
            gates,
            state,
        )
        return self.out_proj(self.norm(output, gate.unflatten(-1, (-1, heads.value_dim))).flatten(1))


class DeltaHeads:
    """One rank's heads: key heads from `start` on, and the value heads that belong to them."""

    def __init__(self, linear_attention: LinearAttentionConfig, communicator: Communicator) -> None:
        self.total = linear_attention
        self.count = divide(linear_attention.key_heads, communicator.world_size)
        self.start = communicator.rank * self.count
        self.sharers = linear_attention.value_heads // linear_attention.key_heads
        """Value heads of one key head."""
        self.key_dim = linear_attention.key_head_dim
        self.value_dim = linear_attention.value_head_dim
        self.keys = self.count * self.key_dim
        """Features of this rank's key heads."""
        self.value_heads = self.count * self.sharers
        self.values = self.value_heads * self.value_dim
        """Features of this rank's value heads."""

    @property
    def convolved(self) -> tuple[int, int, int]:
        """Features that are convolved: queries, keys, values."""
        return (self.keys, self.keys, self.values)

    @property
    def projected(self) -> tuple[int, int, int, int]:
        """Features of the input projection: convolved, output gates, learning rates (beta), time steps."""
        return (sum(self.convolved), self.values, self.value_heads, self.value_heads)

    @property
    def state_shape(self) -> StateShape:
        """What the layer keeps of a sequence."""
        return StateShape(
            channels=sum(self.convolved),
            taps=self.total.convolution - 1,
            value_heads=self.value_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
        )

    def convolved_parts(self, name: str, shape: tuple[int, ...]) -> list[TensorPart]:
        """This rank's rows of a tensor whose first dimension has all queries, then all keys, then all values."""
        parts, offset, before = [], 0, 0
        for rows, total in zip(self.convolved, self._convolved_totals, strict=True):
            start = before + self.start * (rows // self.count)
            parts.append(
                TensorPart(checkpoint_name=name, shape=shape, dimension=0, start=start, length=rows, offset=offset)
            )
            offset += rows
            before += total
        return parts

    @property
    def _convolved_totals(self) -> tuple[int, int, int]:
        return (self.total.key_features, self.total.key_features, self.total.value_features)

    @property
    def convolved_total(self) -> int:
        """Convolved features of all ranks."""
        return sum(self._convolved_totals)


class DeltaProjection(ShardedModule):
    """The input projections as one product: queries, keys, values, output gates, learning rates, time steps.

    Checkpoints store them apart (in_proj_qkv, _z, _b, _a), or interleaved: in_proj_qkvz holds, for each key head, its
    query, its key, its values and their gates; in_proj_ba its learning rates and time steps.
    """

    def __init__(self, heads: DeltaHeads, hidden_size: int, *, interleaved: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.hidden_size = hidden_size
        self.interleaved = interleaved
        self.weight = empty_weight(sum(heads.projected), hidden_size, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden size) -> (T, sum of projected)."""
        return linear(hidden, self.weight)

    def parts(self, name: str) -> list[TensorPart]:
        """Rows of this rank's heads, of each kind."""
        return self._interleaved() if self.interleaved else self._separate()

    def _separate(self) -> list[TensorPart]:
        heads = self.heads
        shape = (heads.convolved_total, self.hidden_size)
        parts = heads.convolved_parts("in_proj_qkv.weight", shape)
        offset = heads.projected[0]
        for name, rows in zip(("z", "b", "a"), heads.projected[1:], strict=True):
            per_head = rows // heads.count
            parts.append(
                TensorPart(
                    checkpoint_name=f"in_proj_{name}.weight",
                    shape=(heads.total.key_heads * per_head, self.hidden_size),
                    dimension=0,
                    start=heads.start * per_head,
                    length=rows,
                    offset=offset,
                )
            )
            offset += rows
        return parts

    def _interleaved(self) -> list[TensorPart]:
        heads = self.heads
        query, key, value = heads.convolved
        gates = heads.projected[1]
        offsets = (0, query, query + key, query + key + value)
        parts = self._groups("in_proj_qkvz.weight", (query, key, value, gates), offsets)
        rates = sum(heads.projected[:2])
        return parts + self._groups("in_proj_ba.weight", heads.projected[2:], (rates, rates + heads.value_heads))

    def _groups(self, name: str, sizes: tuple[int, ...], offsets: tuple[int, ...]) -> list[TensorPart]:
        """sizes: rows of each kind on this rank; offsets: where each kind begins in the parameter."""
        heads = self.heads
        per_head = [size // heads.count for size in sizes]
        shape = (heads.total.key_heads * sum(per_head), self.hidden_size)
        parts: list[TensorPart] = []
        for head in range(heads.count):
            start = (heads.start + head) * sum(per_head)
            for rows, offset in zip(per_head, offsets, strict=True):
                parts.append(
                    TensorPart(
                        checkpoint_name=name,
                        shape=shape,
                        dimension=0,
                        start=start,
                        length=rows,
                        offset=offset + head * rows,
                    )
                )
                start += rows
        return parts


class DeltaConvolution(ShardedModule):
    """The convolution's weight: (this rank's queries, keys and values, 1, tokens)."""

    def __init__(self, heads: DeltaHeads, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = heads
        self.weight = empty_weight(sum(heads.convolved), 1, heads.total.convolution, dtype=dtype)

    def parts(self, name: str) -> list[TensorPart]:
        """Queries, keys and values are split each for themselves: one range of all rows would mix them up."""
        shape = (self.heads.convolved_total, 1, self.heads.total.convolution)
        return self.heads.convolved_parts(f"{name}.weight", shape)


class PerHead(ShardedModule):
    """One float32 number for each value head."""

    def __init__(self, heads: DeltaHeads) -> None:
        super().__init__()
        self.heads = heads
        self.weight = empty_weight(heads.value_heads, dtype=torch.float32)

    def parts(self, name: str) -> list[TensorPart]:
        """A range of the tensor, whose name is the layer's."""
        heads = self.heads
        return [
            TensorPart(
                checkpoint_name=name,
                shape=(heads.total.value_heads,),
                dimension=0,
                start=heads.start * heads.sharers,
                length=heads.value_heads,
            )
        ]


class GatedRmsNorm(RmsNorm):
    """RmsNorm of each head's output, times SiLU of its gate."""

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(T, heads, size), gate alike -> the same shape."""
        return gated_normalise(hidden, gate, self.weight, self.eps)
