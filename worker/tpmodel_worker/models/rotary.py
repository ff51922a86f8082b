"""Rotary position embedding, with the frequency scalings that checkpoints ask for."""

from __future__ import annotations

import math

import torch
from torch import nn

from tpmodel_worker.models.config_types import RopeConfig


class RotaryEmbedding(nn.Module):
    """Turns pairs of the first D dimensions (i, i + D / 2) by an angle that grows with the position.

    D is head_dim times the rope's partial_rotary_factor.
    """

    frequencies: torch.Tensor
    """(D / 2,) float32, radians per position."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self.attention_factor = rope.attention_factor
        dimensions = int(head_dim * rope.partial_rotary_factor)
        self.register_buffer("frequencies", rope_frequencies(rope, dimensions), persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """What `rotate` needs, computed once for all layers.

        Args:
            positions: (T,) int64.
            dtype: of the vectors to be turned.

        Returns:
            (T, 1, D) cosines, and sines whose first half is negated.
        """
        # Angles need float32: positions times frequencies are far from what bfloat16 can tell apart.
        angles = positions.unsqueeze(-1).float() * self.frequencies
        cosines, sines = angles.cos(), angles.sin()
        if self.attention_factor != 1.0:
            cosines, sines = cosines * self.attention_factor, sines * self.attention_factor
        cosines = torch.cat((cosines, cosines), dim=-1)
        sines = torch.cat((-sines, sines), dim=-1)
        return cosines.unsqueeze(1).to(dtype), sines.unsqueeze(1).to(dtype)


def rope_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Radians per position of every pair of head_dim rotated dimensions: (head_dim / 2,) float32 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / rope.theta**exponents
    match rope.rope_type:
        case "default" | "dynamic":
            # A dynamic base grows with the context beyond max_position_embeddings, where no context gets.
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "yarn":
            return _yarn_frequencies(rope, head_dim, frequencies)
        case "llama3":
            return _llama3_frequencies(rope, frequencies)


def _yarn_frequencies(rope: RopeConfig, head_dim: int, frequencies: torch.Tensor) -> torch.Tensor:
    """Keeps fast dimensions, stretches slow ones by the factor, and blends linearly in between."""

    def dimension_of(rotations: float) -> float:
        """Which pair turns this many times over the original context."""
        wavelength = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device="cpu")
    stretched = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies / rope.factor * stretched + frequencies * (1 - stretched)


def _llama3_frequencies(rope: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Keeps wavelengths well inside the original context, stretches longer ones, and blends in between."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies
