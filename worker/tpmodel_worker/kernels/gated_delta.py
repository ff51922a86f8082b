"""Gated delta rule over recurrent state: one interface, chosen once for each batch.

A layer keeps, for each sequence and head, a matrix S that maps keys to values. Each token decays it, corrects what it
gives for the token's key, and reads it (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024):

    S <- exp(g) S;  S <- S + k (beta (v - k S));  output = q S
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from tpmodel_worker.models.batch import ForwardBatch, LayerState


class GatedDelta(ABC):
    """What the linear-attention layers of one batch compute. Made once for a batch, used by every layer."""

    @abstractmethod
    def convolve(self, features: torch.Tensor, weight: torch.Tensor, state: LayerState) -> torch.Tensor:
        """Each feature's causal convolution over its sequence's last tokens, then SiLU; moves the state on.

        Args:
            features: (T, channels) in the state's dtype.
            weight: (channels, 1, taps + 1), the newest token's tap last.
            state: one layer's; its convolution holds the last `taps` tokens of each sequence.

        Returns:
            (T, channels) in features' dtype.
        """

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
        state: LayerState,
    ) -> torch.Tensor:
        """Reads every token's output and moves the recurrent state on.

        Queries and keys are brought to length 1, and queries then divided by the root of key_dim.

        Args:
            query: (T, key_heads, key_dim).
            key: as query.
            value: (T, value_heads, value_dim); value_heads is a multiple of key_heads, neighbours share a key head.
            decay: (T, value_heads) float32, g above; at most 0.
            beta: (T, value_heads) float32, from 0 to 1.
            state: one layer's.

        Returns:
            (T, value_heads, value_dim) in value's dtype; computed in float32.
        """


def prepare_gated_delta(batch: ForwardBatch, taps: int) -> GatedDelta:
    """The implementation for the batch's device; taps: tokens that the convolution looks back.

    Plain torch is what there is, on every device. Other kernels (fla-core's on CUDA) would be chosen here.
    """
    from tpmodel_worker.kernels.gated_delta_torch import TorchGatedDelta

    return TorchGatedDelta(batch, taps)
