"""config.json of model_type `qwen3`."""

from __future__ import annotations

from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import DtypeName, ModelConfig
from tpmodel_worker.models.rope_config import read_rope

DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Training, bookkeeping, and what other tasks or other front ends read.
WITHOUT_EFFECT = (
    "_name_or_path",
    "attention_dropout",  # drops in training only
    "bos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
)


def parse_qwen3(reader: ConfigReader) -> ModelConfig:
    """Reads every key; eos ids, generation defaults and the context limit are filled in by the caller.

    Raises:
        ConfigError: a key or value that models/qwen3.py does not honour.
    """
    reader.require("architectures", ["Qwen3ForCausalLM"], because="other heads are not served")
    reader.require("attention_bias", False, because="projections have no bias here")
    reader.require("chunk_size_feed_forward", 0, because="feed-forward layers are not chunked")
    reader.require("hidden_act", "silu", because="the feed-forward layers compute SiLU")
    reader.require("is_encoder_decoder", False, because="this is a decoder")
    reader.require("use_sliding_window", False, because="attention sees the whole context")
    # Both act only together with use_sliding_window.
    reader.without_effect(("sliding_window", "max_window_layers"))
    reader.without_effect(WITHOUT_EFFECT)
    layers = reader.integer("num_hidden_layers")
    reader.require("layer_types", ["full_attention"] * layers, because="every layer attends to the whole context")
    hidden_size = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads")
    max_position_embeddings = reader.integer("max_position_embeddings")
    return ModelConfig(
        model_type="qwen3",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        head_dim=_read_head_dim(reader),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        rope=read_rope(reader, default_theta=10000.0, max_position_embeddings=max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        max_model_len=max_position_embeddings,
        dtype=_read_dtype(reader),
    )


def _read_head_dim(reader: ConfigReader) -> int:
    # Files written before the key existed mean this architecture's own default.
    head_dim = reader.integer("head_dim", 128)
    if head_dim % 2:
        raise reader.error("head_dim", head_dim, "must be even: rotary embedding turns pairs of dimensions")
    return head_dim


def _read_dtype(reader: ConfigReader) -> DtypeName:
    newer, older = reader.raw("dtype"), reader.raw("torch_dtype")
    if newer is not None and older is not None and newer != older:
        raise reader.error("torch_dtype", older, f"contradicts dtype = {newer!r}")
    name = newer if newer is not None else older if older is not None else "float32"
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise reader.error("dtype", name, f"not supported; supported: {', '.join(DTYPES)}")
