"""Random inputs of the gated delta rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tpmodel_worker.kernels.gated_delta import DeltaGates, prepare_gated_delta
from tpmodel_worker.models.batch import ForwardBatch

TAPS = 3


def random(generator, *shape):
    return torch.randn(shape, generator=generator)


def make_batch(lengths, slots, device="cpu") -> ForwardBatch:
    """Only what the kernels read is filled in; sequences of one token come first, as decodes."""
    starts = torch.tensor([0, *lengths]).cumsum(0)
    values: dict[str, Any] = dict.fromkeys(ForwardBatch.__slots__, None)
    values |= {
        "token_ids": torch.zeros(sum(lengths), dtype=torch.int64, device=device),
        "slots": torch.tensor(slots, device=device),
        "query_starts": starts.to(torch.int32).to(device),
        "decodes": sum(length == 1 for length in lengths),
        "query_lengths": tuple(lengths),
    }
    return ForwardBatch(**values)


@dataclass
class DeltaCase:
    """What attend takes, of all tokens of a batch; queries, keys and values as the convolution leaves them."""

    features: torch.Tensor
    sizes: tuple[int, int, int, int]
    """Key heads, value heads, and the features of each."""
    gates: DeltaGates

    @classmethod
    def random(cls, generator, tokens, sizes):
        key_heads, value_heads, key_dim, value_dim = sizes
        gates = DeltaGates(
            step=random(generator, tokens, value_heads),
            rate=random(generator, tokens, value_heads),
            step_bias=random(generator, value_heads),
            log_decay=-2 - random(generator, value_heads).abs(),
        )
        return cls(random(generator, tokens, 2 * key_heads * key_dim + value_heads * value_dim), sizes, gates)

    @property
    def parts(self):
        """Queries, keys, values."""
        key_heads, value_heads, key_dim, value_dim = self.sizes
        keys, values = key_heads * key_dim, value_heads * value_dim
        query, key, value = self.features.split((keys, keys, values), dim=-1)
        return (
            query.unflatten(-1, (-1, key_dim)),
            key.unflatten(-1, (-1, key_dim)),
            value.unflatten(-1, (-1, value_dim)),
        )

    def rows(self, start, end):
        return DeltaCase(self.features[start:end], self.sizes, self.gates.rows(start, end))

    def on(self, device, dtype=torch.float32):
        """Gates' parameters stay float32."""
        gates = self.gates
        moved = (gates.step.to(device, dtype), gates.rate.to(device, dtype))
        gates = DeltaGates(*moved, gates.step_bias.to(device), gates.log_decay.to(device))
        return DeltaCase(self.features.to(device, dtype), self.sizes, gates)

    def attend(self, batch, state):
        return prepare_gated_delta(batch, TAPS).attend(*self.parts, self.gates, state)
