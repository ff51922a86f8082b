"""Which part of each checkpoint tensor a rank holds, and where in its own parameters that part goes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

VOCAB_ALIGNMENT = 64
"""Rows of a vocabulary shard are a multiple of this, so that products stay well shaped at any world size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """`length` rows or columns of one checkpoint tensor, from `start`, that belong at `offset` of a parameter.

    start, length and offset count along `dimension` of the checkpoint tensor; the other dimensions are taken whole.
    """

    checkpoint_name: str
    """Relative to the module that holds the layer: `q_proj.weight` for `layers.0.self_attn.qkv_proj`."""
    shape: tuple[int, ...]
    """Of the whole checkpoint tensor."""
    dimension: int
    start: int
    length: int
    offset: int = 0
    stack_index: int | None = None
    """Where the parameter stacks checkpoint tensors along its first dimension: the place of this one."""

    def within(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part's place in its parameter, a view in the part's shape."""
        place = parameter if self.stack_index is None else parameter[self.stack_index]
        return place.narrow(self.dimension, self.offset, self.length)


class ShardedModule(nn.Module, ABC):
    """A layer with one parameter, `weight`, which it can tell where to find in a checkpoint."""

    weight: nn.Parameter

    @abstractmethod
    def parts(self, name: str) -> list[TensorPart]:
        """The parts of checkpoint tensors that fill `weight`; name: what the layer is called in its module."""

    def layouts(self, name: str) -> list[list[TensorPart]]:
        """Every way in which checkpoints store the layer, each as `parts`; dummy weights are named by the first."""
        return [self.parts(name)]


def empty_weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """A parameter to be bound to memory later; takes none itself when made on the meta device."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


def divide(total: int, world_size: int) -> int:
    """A rank's share of something that has been checked to divide (config.check_world_size)."""
    share, rest = divmod(total, world_size)
    if rest:
        raise ValueError(f"{total} is not divisible by world size {world_size}")
    return share


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The attention heads of one rank. With fewer KV heads than ranks, neighbouring ranks hold the same one."""

    query_heads: int
    query_start: int
    kv_heads: int
    kv_start: int

    @classmethod
    def of_rank(cls, query_heads: int, kv_heads: int, rank: int, world_size: int) -> HeadShard:
        """Splits heads by KV group, so that every query head is with the KV head that it reads."""
        queries = divide(query_heads, world_size)
        if kv_heads >= world_size:
            kv = divide(kv_heads, world_size)
            return cls(queries, rank * queries, kv, rank * kv)
        return cls(queries, rank * queries, 1, rank // divide(world_size, kv_heads))


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The token ids of one rank: from `start`, `size` rows, of which only the first `valid` exist."""

    start: int
    size: int
    valid: int

    @classmethod
    def of_rank(cls, vocab_size: int, rank: int, world_size: int) -> VocabShard:
        """Equal shards of a whole number of VOCAB_ALIGNMENT rows; the last ones may be partly or wholly padding."""
        share = -(-vocab_size // world_size)
        size = -(-share // VOCAB_ALIGNMENT) * VOCAB_ALIGNMENT
        start = rank * size
        return cls(start, size, min(max(vocab_size - start, 0), size))
