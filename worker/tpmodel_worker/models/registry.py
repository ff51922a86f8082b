"""Which class computes which model_type. models/config.py has the torch-free half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config_types import ConfigError, ModelConfig
from tpmodel_worker.models.qwen3 import Qwen3ForCausalLM
from tpmodel_worker.models.qwen3_5 import Qwen35ForCausalLM, Qwen35ForConditionalGeneration
from tpmodel_worker.models.qwen3_moe import Qwen3MoeForCausalLM
from tpmodel_worker.models.qwen3_next import Qwen3NextForCausalLM

_Architecture = Callable[[ModelConfig, Communicator, torch.dtype], CausalLanguageModel]
_ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType(
    {
        "qwen3": Qwen3ForCausalLM,
        "qwen3_5": Qwen35ForConditionalGeneration,
        "qwen3_5_moe": Qwen35ForConditionalGeneration,
        "qwen3_5_moe_text": Qwen35ForCausalLM,
        "qwen3_5_text": Qwen35ForCausalLM,
        "qwen3_moe": Qwen3MoeForCausalLM,
        "qwen3_next": Qwen3NextForCausalLM,
    }
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
