"""config.json of model_type `qwen3`."""

from __future__ import annotations

from tpmodel_worker.models.config_parts import read_decoder, read_dtype, read_eos, read_head_dim
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.rope_config import read_rope

# Files written before the key existed mean this architecture's own default.
_HEAD_DIM = 128


def parse_qwen3(reader: ConfigReader) -> ModelConfig:
    """Reads every key; generation defaults and the context limit are filled in by the caller.

    Raises:
        ConfigError: a key or value that models/qwen3.py does not honour.
    """
    read_decoder(reader, architecture="Qwen3ForCausalLM")
    layers = reader.integer("num_hidden_layers")
    reader.require("layer_types", ["full_attention"] * layers, because="every layer attends to the whole context")
    heads = reader.integer("num_attention_heads")
    max_position_embeddings = reader.integer("max_position_embeddings")
    vocab_size = reader.integer("vocab_size")
    return ModelConfig(
        model_type="qwen3",
        vocab_size=vocab_size,
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        head_dim=read_head_dim(reader, _HEAD_DIM),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        rope=read_rope(reader, default_theta=10000.0, max_position_embeddings=max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        max_model_len=max_position_embeddings,
        dtype=read_dtype(reader),
        eos_token_ids=read_eos(reader, vocab_size),
    )
