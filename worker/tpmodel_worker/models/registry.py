"""Which class computes which model_type. models/config.py has the torch-free half."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config_types import ConfigError, ModelConfig
from tpmodel_worker.models.qwen3 import Qwen3ForCausalLM
from tpmodel_worker.models.qwen3_moe import Qwen3MoeForCausalLM

_ARCHITECTURES: Mapping[str, type[Qwen3ForCausalLM]] = MappingProxyType(
    {"qwen3": Qwen3ForCausalLM, "qwen3_moe": Qwen3MoeForCausalLM}
)


def build_model(config: ModelConfig, *, communicator: Communicator, dtype: torch.dtype) -> CausalLanguageModel:
    """The rank's shard on the meta device: shapes without memory, to be bound to an arena.

    Raises:
        ConfigError: no class computes config.model_type.
    """
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError(f"model_type {config.model_type!r} is not supported; supported: {supported}")
    with torch.device("meta"):
        return architecture(config, communicator, dtype).eval()
