"""The dense feed-forward layer."""

from __future__ import annotations

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.fusion import silu_and_multiply
from tpmodel_worker.models.layers import MergedColumnParallelLinear, RowParallelLinear


class SwigluMlp(nn.Module):
    """down(silu(gate(x)) * up(x)), split over the intermediate features."""

    def __init__(self, hidden_size: int, features: int, communicator: Communicator, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, features, ("gate_proj", "up_proj"), communicator, dtype=dtype
        )
        self.down_proj = RowParallelLinear(features, hidden_size, communicator, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden size) -> the same, whole on every rank."""
        return self.down_proj(self._inner(hidden))

    def share(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's share of what forward returns, for callers that add other shares before one all-reduce."""
        return self.down_proj.share(self._inner(hidden))

    def _inner(self, hidden: torch.Tensor) -> torch.Tensor:
        return silu_and_multiply(self.gate_up_proj(hidden))
