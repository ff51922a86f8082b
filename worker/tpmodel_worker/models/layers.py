"""Tensor-parallel layers. Each names its way of splitting: by columns, by rows, or by vocabulary.

A layer knows its rank's part of the checkpoint (`parts`) and computes on the rank's device. Activations
between layers are whole on every rank: a column-parallel layer splits its output, the row-parallel
one after it sums the ranks' shares with one all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.fusion import add_and_normalise
from tpmodel_worker.kernels.linear import linear
from tpmodel_worker.models.sharding import HeadShard, ShardedModule, TensorPart, VocabShard, divide, empty_weight


class CommunicatingModule(nn.Module):
    """A module that exchanges tensors with the other ranks; a new epoch hands it a new communicator."""

    def __init__(self, communicator: Communicator) -> None:
        super().__init__()
        self.communicator = communicator


class RmsNorm(ShardedModule):
    """Divides by the root of the mean square of the last dimension, then scales. Whole on every rank."""

    zero_centred = False
    """Whether the scale is 1 + weight."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.size = size
        self.eps = eps
        self.weight = empty_weight(size, dtype=dtype)

    def forward(self, hidden: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        """(T, size), to which update is added in place before -> the same shape; the mean is taken in float32."""
        return add_and_normalise(hidden, update, self.weight, self.eps, zero_centred=self.zero_centred)

    def parts(self, name: str) -> list[TensorPart]:
        """The whole tensor."""
        return [
            TensorPart(checkpoint_name=f"{name}.weight", shape=(self.size,), dimension=0, start=0, length=self.size)
        ]


class ZeroCentredRmsNorm(RmsNorm):
    """RmsNorm whose scale is 1 + weight, applied in float32."""

    zero_centred = True


class MergedColumnParallelLinear(ShardedModule):
    """Several column-parallel linears of one input, computed as one product."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        names: Sequence[str],
        communicator: Communicator,
        *,
        dtype: torch.dtype,
    ) -> None:
        """names: of the layers in the checkpoint, each (outputs, inputs), in the order of the output."""
        super().__init__()
        self.names = tuple(names)
        self.shape = (outputs, inputs)
        self.columns = divide(outputs, communicator.world_size)
        self.start = communicator.rank * self.columns
        self.weight = empty_weight(len(self.names) * self.columns, inputs, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, inputs) -> (T, len(names) * outputs / world size)."""
        return linear(hidden, self.weight)

    def parts(self, name: str) -> list[TensorPart]:
        """A range of rows of every merged layer."""
        return [
            TensorPart(
                checkpoint_name=f"{merged}.weight",
                shape=self.shape,
                dimension=0,
                start=self.start,
                length=self.columns,
                offset=index * self.columns,
            )
            for index, merged in enumerate(self.names)
        ]


class QkvParallelLinear(ShardedModule):
    """Query, key and value projections as one product, split by KV-head group.

    gated: q_proj gives, for each head, its query and then a gate of the same size, which counts as a head of its own.
    """

    def __init__(
        self,
        inputs: int,
        heads: HeadShard,
        *,
        total_heads: int,
        total_kv_heads: int,
        head_dim: int,
        gated: bool = False,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.query_width = 2 if gated else 1
        self.query_shape = (total_heads * self.query_width * head_dim, inputs)
        self.kv_shape = (total_kv_heads * head_dim, inputs)
        self.counts = (heads.query_heads * self.query_width, heads.kv_heads, heads.kv_heads)
        """Heads of the output: queries (and gates), keys, values."""
        self.weight = empty_weight(sum(self.counts) * head_dim, inputs, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, inputs) -> (T, sum of counts, head_dim): queries, then keys, then values."""
        return linear(hidden, self.weight).unflatten(-1, (-1, self.head_dim))

    def parts(self, name: str) -> list[TensorPart]:
        """Rows of `q_proj`, `k_proj` and `v_proj`."""
        parts, offset = [], 0
        for projection, shape, start, count in (
            ("q_proj", self.query_shape, self.heads.query_start * self.query_width, self.counts[0]),
            ("k_proj", self.kv_shape, self.heads.kv_start, self.heads.kv_heads),
            ("v_proj", self.kv_shape, self.heads.kv_start, self.heads.kv_heads),
        ):
            parts.append(
                TensorPart(
                    checkpoint_name=f"{projection}.weight",
                    shape=shape,
                    dimension=0,
                    start=start * self.head_dim,
                    length=count * self.head_dim,
                    offset=offset,
                )
            )
            offset += count * self.head_dim
        return parts


class ReplicatedLinear(ShardedModule):
    """Linear without bias that every rank holds and computes whole."""

    def __init__(self, inputs: int, outputs: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.weight = empty_weight(outputs, inputs, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, inputs) -> (T, outputs)."""
        return linear(hidden, self.weight)

    def parts(self, name: str) -> list[TensorPart]:
        """The whole tensor."""
        return [
            TensorPart(checkpoint_name=f"{name}.weight", shape=self.shape, dimension=0, start=0, length=self.shape[0])
        ]


class RowParallelLinear(CommunicatingModule, ShardedModule):
    """Linear without bias whose input features are split over the ranks: one all-reduce sums the shares."""

    def __init__(self, inputs: int, outputs: int, communicator: Communicator, *, dtype: torch.dtype) -> None:
        super().__init__(communicator)
        self.shape = (outputs, inputs)
        self.rows = divide(inputs, communicator.world_size)
        self.start = communicator.rank * self.rows
        self.weight = empty_weight(outputs, self.rows, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, inputs / world size), this rank's features -> (T, outputs), whole on every rank."""
        return self.communicator.all_reduce(self.share(hidden))

    def share(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of the sum, for callers that add other shares before one all-reduce."""
        return linear(hidden, self.weight)

    def parts(self, name: str) -> list[TensorPart]:
        """A range of columns: checkpoints keep weights as (outputs, inputs)."""
        return [
            TensorPart(
                checkpoint_name=f"{name}.weight", shape=self.shape, dimension=1, start=self.start, length=self.rows
            )
        ]


class VocabParallelEmbedding(CommunicatingModule, ShardedModule):
    """Token embeddings split by token id; rows past the vocabulary's end are zero."""

    def __init__(
        self, vocab_size: int, size: int, shard: VocabShard, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__(communicator)
        self.shape = (vocab_size, size)
        self.shard = shard
        self.weight = empty_weight(shard.size, size, dtype=dtype)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """(T,) int64 -> (T, size), whole on every rank."""
        if self.communicator.world_size == 1:
            return F.embedding(token_ids, self.weight)
        # Every id lies in one shard: the others add zero, so that the sum is exact.
        local = token_ids - self.shard.start
        elsewhere = (local < 0) | (local >= self.shard.size)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.communicator.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def parts(self, name: str) -> list[TensorPart]:
        """A range of rows."""
        return vocab_parts(name, self.shape, self.shard)


class ParallelLanguageModelHead(ShardedModule):
    """Logits of this rank's token ids. May share its weight with the embedding (tied)."""

    def __init__(
        self,
        vocab_size: int,
        size: int,
        shard: VocabShard,
        *,
        tied_to: nn.Parameter | None = None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.shape = (vocab_size, size)
        self.shard = shard
        self.weight = tied_to if tied_to is not None else empty_weight(shard.size, size, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(R, size) -> (R, shard size) float32; -inf where no token exists."""
        logits = linear(hidden, self.weight).float()
        if self.shard.valid < self.shard.size:
            logits[:, self.shard.valid :] = float("-inf")
        return logits

    def parts(self, name: str) -> list[TensorPart]:
        """A range of rows."""
        return vocab_parts(name, self.shape, self.shard)


def vocab_parts(name: str, shape: tuple[int, ...], shard: VocabShard) -> list[TensorPart]:
    """The rows of a (vocabulary, size) tensor that a shard holds; of length 0 for one that is all padding."""
    start = min(shard.start, shape[0])
    return [TensorPart(checkpoint_name=f"{name}.weight", shape=shape, dimension=0, start=start, length=shard.valid)]
