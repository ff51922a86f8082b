"""Qwen3 with a mixture of experts: the dense model's layers, with experts in place of most feed-forward layers."""

from __future__ import annotations

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.experts import SparseMlp
from tpmodel_worker.models.feed_forward import SwigluMlp
from tpmodel_worker.models.qwen3 import Qwen3ForCausalLM


class Qwen3MoeForCausalLM(Qwen3ForCausalLM):
    """One rank's shard of the model; module names follow the checkpoint's."""

    def make_mlps(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> list[nn.Module]:
        """Experts in the layers that the config names, a dense feed-forward layer in the others."""
        experts = config.experts
        assert experts is not None, "the config of this model_type has experts"
        return [
            SparseMlp(experts, config.hidden_size, communicator, dtype=dtype)
            if layer in experts.layers
            else SwigluMlp(config.hidden_size, config.intermediate_size, communicator, dtype=dtype)
            for layer in range(config.num_hidden_layers)
        ]
