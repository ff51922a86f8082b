"""config.json of model_type `qwen3_next`."""

from __future__ import annotations

import dataclasses

from tpmodel_worker.models.config_parts import read_decoder, read_experts, read_sparse_layers
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.hybrid_config import read_hybrid


def parse_qwen3_next(reader: ConfigReader) -> ModelConfig:
    """Reads every key; generation defaults and the context limit are filled in by the caller.

    Raises:
        ConfigError: a key or value that models/qwen3_next.py does not honour.
    """
    read_decoder(reader, architecture="Qwen3NextForCausalLM")
    layers = reader.integer("num_hidden_layers")
    experts = read_experts(
        reader, layers=read_sparse_layers(reader, layers), normalise_weights=reader.flag("norm_topk_prob", True)
    )
    shared = reader.integer("shared_expert_intermediate_size")
    return read_hybrid(
        reader,
        model_type="qwen3_next",
        experts=dataclasses.replace(experts, shared_intermediate_size=shared),
        intermediate_size=reader.integer("intermediate_size"),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
    )
