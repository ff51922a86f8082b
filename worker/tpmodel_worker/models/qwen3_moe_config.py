"""config.json of model_type `qwen3_moe`."""

from __future__ import annotations

from tpmodel_worker.models.config_parts import (
    read_decoder,
    read_dtype,
    read_eos,
    read_experts,
    read_head_dim,
    read_sparse_layers,
)
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.rope_config import read_rope


def parse_qwen3_moe(reader: ConfigReader) -> ModelConfig:
    """Reads every key; generation defaults and the context limit are filled in by the caller.

    Raises:
        ConfigError: a key or value that models/qwen3_moe.py does not honour.
    """
    read_decoder(reader, architecture="Qwen3MoeForCausalLM")
    layers = reader.integer("num_hidden_layers")
    reader.require("layer_types", ["full_attention"] * layers, because="every layer attends to the whole context")
    hidden_size = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    max_position_embeddings = reader.integer("max_position_embeddings")
    vocab_size = reader.integer("vocab_size")
    experts = read_experts(
        reader, layers=read_sparse_layers(reader, layers), normalise_weights=reader.flag("norm_topk_prob", False)
    )
    return ModelConfig(
        model_type="qwen3_moe",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        head_dim=read_head_dim(reader, max(hidden_size // heads, 1)),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        rope=read_rope(reader, default_theta=10000.0, max_position_embeddings=max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        max_model_len=max_position_embeddings,
        dtype=read_dtype(reader),
        experts=experts,
        eos_token_ids=read_eos(reader, vocab_size),
    )
