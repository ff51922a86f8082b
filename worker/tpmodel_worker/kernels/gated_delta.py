"""Gated delta rule over recurrent state: one interface, chosen once for each batch.

A layer keeps, for each sequence and head, a matrix S that maps keys to values. Each token decays it, corrects what it
gives for the token's key, and reads it (Yang, Kautz, Hatamizadeh: Gated Delta Networks, 2024):

    S <- exp(g) S;  S <- S + k (beta (v - k S));  output = q S
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.models.batch import ForwardBatch, LayerState


@dataclass(frozen=True, slots=True)
class DeltaGates:
    """What the tokens' g and beta are made of."""

    step: torch.Tensor
    """(T, value_heads), before its bias and softplus."""
    rate: torch.Tensor
    """(T, value_heads), beta before its sigmoid."""
    step_bias: torch.Tensor
    """(value_heads,) float32."""
    log_decay: torch.Tensor
    """(value_heads,) float32; A_log in checkpoints."""

    def rows(self, start: int, end: int | None = None) -> DeltaGates:
        """Those of a range of tokens."""
        return DeltaGates(self.step[start:end], self.rate[start:end], self.step_bias, self.log_decay)

    def decay(self) -> torch.Tensor:
        """(T, value_heads) float32: g, at most 0."""
        return -self.log_decay.exp() * F.softplus(self.step.float() + self.step_bias)

    def beta(self) -> torch.Tensor:
        """(T, value_heads) float32, from 0 to 1."""
        return self.rate.float().sigmoid()


class GatedDelta(ABC):
    """What the linear-attention layers of one batch compute. Made once for a batch, used by every layer."""

    @abstractmethod
    def convolve(self, features: torch.Tensor, weight: torch.Tensor, state: LayerState) -> torch.Tensor:
        """Each feature's causal convolution over its sequence's last tokens, then SiLU; moves the state on.

        Args:
            features: (T, channels) in the state's dtype, neighbours of a row contiguous.
            weight: (channels, 1, taps + 1), the newest token's tap last.
            state: one layer's; its convolution holds the last `taps` tokens of each sequence.

        Returns:
            (T, channels) in features' dtype.
        """

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: DeltaGates, state: LayerState
    ) -> torch.Tensor:
        """Reads every token's output and moves the recurrent state on.

        Queries and keys are brought to length 1, and queries then divided by the root of key_dim.

        Args:
            query: (T, key_heads, key_dim), neighbours in the last two dimensions contiguous.
            key: as query.
            value: (T, value_heads, value_dim), as query; value_heads is a multiple of key_heads, neighbours share a
                key head.
            gates: of the same tokens.
            state: one layer's.

        Returns:
            (T, value_heads, value_dim) in value's dtype. The state is float32, and so is what decodes compute; chunks
            may multiply in value's dtype.
        """


def prepare_gated_delta(batch: ForwardBatch, taps: int) -> GatedDelta:
    """The implementation for the batch's device; taps: tokens that the convolution looks back.

    On CUDA nothing waits for the device.
    """
    if batch.token_ids.is_cuda:
        # Triton is neither needed nor installed everywhere without a GPU.
        from tpmodel_worker.kernels.gated_delta_cuda import CudaGatedDelta

        return CudaGatedDelta(batch, taps)
    from tpmodel_worker.kernels.gated_delta_torch import TorchGatedDelta

    return TorchGatedDelta(batch, taps)
