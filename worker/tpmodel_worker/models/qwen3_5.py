"""Qwen3.5, dense and with experts: Qwen3-Next's layers, with the linear layers' projections stored apart.

The text part of published checkpoints, which hold a vision encoder too, or a checkpoint of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.models.batch import ForwardBatch, LayerCache
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.qwen3_next import HybridCausalLM, HybridModel


class Qwen35Model(nn.Module):
    """Holds the decoder under the name that checkpoints have for it, beside a vision encoder."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__()
        self.language_model = HybridModel(config, communicator, dtype, interleaved=False)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """See HybridModel.forward."""
        return self.language_model(batch, caches)


class Qwen35ForConditionalGeneration(HybridCausalLM):
    """One rank's shard of the model; module names follow the checkpoint's."""

    unused_tensors = ("mtp.", "model.visual.")

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__(config, communicator, dtype)
        self.model = Qwen35Model(config, communicator, dtype)
        self.lm_head = self.make_head(self.model.language_model)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """This rank's logits of the batch's sample rows: (R, vocab_shard) float32."""
        return self.lm_head(self.model(batch, caches))


class Qwen35ForCausalLM(HybridCausalLM):
    """One rank's shard of a model without a vision encoder; module names follow the checkpoint's."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__(config, communicator, dtype)
        self.model = HybridModel(config, communicator, dtype, interleaved=False)
        self.lm_head = self.make_head(self.model)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """This rank's logits of the batch's sample rows: (R, vocab_shard) float32."""
        return self.lm_head(self.model(batch, caches))
