"""What one forward pass computes. Runner, models, kernels and caches all speak in this."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The tokens of one step, flattened: first `decodes` rows of one token each, then the prefill chunks.

    B is the number of sequences, T the number of tokens, M the longest block table, R the rows whose
    logits are wanted. All tensors lie on the rank's device. The integers beside them are known on the
    host without waiting for the device; where a sequence may have finished on the device meanwhile,
    they are upper bounds.
    """

    token_ids: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64, position of each token in its sequence."""
    kv_rows: torch.Tensor
    """(T,) int64, where the token's K and V go: block * block_size + offset. Rows of the cache's last
    block, which no sequence owns, take what finished sequences would write."""
    block_tables: torch.Tensor
    """(B, M) int32, padded with 0."""
    slots: torch.Tensor
    """(B,) int64, each sequence's slot, no slot twice: where the recurrent state of its sequence is kept."""
    kv_lengths: torch.Tensor
    """(B,) int32, tokens of each sequence that attention sees, this step's included."""
    query_starts: torch.Tensor
    """(B + 1,) int32, where each sequence's tokens start in T."""
    sample_rows: torch.Tensor
    """(R,) int64, indices into T."""
    decodes: int
    query_lengths: tuple[int, ...]
    """Tokens of each sequence in this step; 1 for the first `decodes`."""
    max_kv_length: int


@dataclass(frozen=True, slots=True)
class LayerKvCache:
    """One layer's paged KV cache on one rank, views of the kv arena."""

    keys: torch.Tensor
    """(num_blocks + 1, block_size, kv_heads, head_dim) in the model's dtype; the last block is scratch."""
    values: torch.Tensor
    """As keys."""


@dataclass(frozen=True, slots=True)
class StateShape:
    """What a linear-attention layer keeps of one sequence on one rank."""

    channels: int
    """Features that are convolved."""
    taps: int
    """Tokens that the convolution looks back."""
    value_heads: int
    key_dim: int
    value_dim: int

    @property
    def convolution(self) -> tuple[int, ...]:
        """The shape of the last tokens' features, in the model's dtype."""
        return (self.taps, self.channels)

    @property
    def recurrent(self) -> tuple[int, ...]:
        """The shape of the matrices that map keys to values, float32."""
        return (self.value_heads, self.key_dim, self.value_dim)


@dataclass(frozen=True, slots=True)
class LayerState:
    """One linear-attention layer's state of all slots on one rank, views of the kv arena.

    Behind the slots there may be rows that no batch names: copies of states.
    """

    convolution: torch.Tensor
    """(slots, taps, channels) in the model's dtype: the last tokens' features before the convolution."""
    recurrent: torch.Tensor
    """(slots, value_heads, key_dim, value_dim) float32."""


LayerCache = LayerKvCache | LayerState
"""What one layer keeps of the sequences: keys and values of every token, or a state of fixed size."""
