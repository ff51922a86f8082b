"""config.json of model_types `qwen3_5` and `qwen3_5_moe`: an object for the decoder beside one for pictures.

And of `qwen3_5_text` and `qwen3_5_moe_text`: the decoder's keys alone.
"""

from __future__ import annotations

import dataclasses

from tpmodel_worker.models.config_parts import read_dtype, read_eos, read_experts, read_layers
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import DtypeName, ExpertsConfig, ModelConfig
from tpmodel_worker.models.hybrid_config import read_hybrid

# Pictures and films are not served: their tokens stand for nothing but themselves.
_VISION = (
    "vision_config",
    "image_token_id",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "language_model_only",
)
# Layers that draft tokens ahead, which are not loaded.
_DRAFTING = ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")


def parse_qwen3_5(reader: ConfigReader) -> ModelConfig:
    """Reads every key of a dense model; generation defaults and the context limit are filled in by the caller.

    Raises:
        ConfigError: a key or value that models/qwen3_5.py does not honour.
    """
    text = _text_config(reader, "qwen3_5_text")
    return _read_parts(reader, text, experts=None)


def parse_qwen3_5_moe(reader: ConfigReader) -> ModelConfig:
    """As parse_qwen3_5, of a model with experts in every layer."""
    text = _text_config(reader, "qwen3_5_moe_text")
    return _read_parts(reader, text, experts=_read_experts(text))


def parse_qwen3_5_text(reader: ConfigReader) -> ModelConfig:
    """As parse_qwen3_5, of a checkpoint of the decoder alone, whose keys no object of their own holds."""
    return _read_alone(reader, experts=None)


def parse_qwen3_5_moe_text(reader: ConfigReader) -> ModelConfig:
    """As parse_qwen3_5_text, of a model with experts in every layer."""
    return _read_alone(reader, experts=_read_experts(reader))


def _text_config(reader: ConfigReader, model_type: str) -> ConfigReader:
    text = reader.section("text_config")
    text.require("model_type", model_type, because=f"it is the decoder of model_type {reader.raw('model_type')}")
    return text


def _read_experts(text: ConfigReader) -> ExpertsConfig:
    text.require("norm_topk_prob", True, because="the weights of a token's experts are made to sum to 1")
    text.require("decoder_sparse_step", 1, because="every layer has experts")
    text.without_effect(("intermediate_size",))  # of dense layers, which there are none of
    experts = read_experts(text, layers=range(text.integer("num_hidden_layers")), normalise_weights=True)
    return dataclasses.replace(experts, shared_intermediate_size=text.integer("shared_expert_intermediate_size"))


def _read_alone(reader: ConfigReader, *, experts: ExpertsConfig | None) -> ModelConfig:
    name = "Qwen3_5ForCausalLM" if experts is None else "Qwen3_5MoeForCausalLM"
    reader.require("architectures", [name], because="other heads are not served")
    return _read_decoder(
        reader,
        model_type="qwen3_5_text" if experts is None else "qwen3_5_moe_text",
        experts=experts,
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        default_dtype=None,
    )


def _read_decoder(
    text: ConfigReader,
    *,
    model_type: str,
    experts: ExpertsConfig | None,
    tie_word_embeddings: bool,
    default_dtype: DtypeName | None,
) -> ModelConfig:
    read_layers(text)
    text.require("attn_output_gate", True, because="full attention is gated")
    text.require("mlp_only_layers", [], because="the config of this model_type has no such layers")
    text.without_effect(_DRAFTING)
    return read_hybrid(
        text,
        model_type=model_type,
        experts=experts,
        intermediate_size=text.integer("intermediate_size") if experts is None else 0,
        tie_word_embeddings=tie_word_embeddings,
        default_dtype=default_dtype,
    )


def _read_parts(reader: ConfigReader, text: ConfigReader, *, experts: ExpertsConfig | None) -> ModelConfig:
    name = "Qwen3_5ForConditionalGeneration" if experts is None else "Qwen3_5MoeForConditionalGeneration"
    reader.require("architectures", [name], because="other heads are not served")
    reader.without_effect(_VISION)
    read_layers(reader)
    tied = reader.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False))
    if text.has("tie_word_embeddings") and text.flag("tie_word_embeddings", False) != tied:
        raise reader.error("tie_word_embeddings", tied, "contradicts text_config.tie_word_embeddings")
    named = reader.has("dtype") or reader.has("torch_dtype")
    outer_dtype = read_dtype(reader)
    config = _read_decoder(
        text,
        model_type="qwen3_5" if experts is None else "qwen3_5_moe",
        experts=experts,
        tie_word_embeddings=tied,
        default_dtype=outer_dtype if named else None,
    )
    if named and config.dtype != outer_dtype:
        raise reader.error("dtype", outer_dtype, f"contradicts text_config.dtype = {config.dtype!r}")
    text.finish()
    if reader.has("eos_token_id"):
        config = dataclasses.replace(config, eos_token_ids=read_eos(reader, config.vocab_size))
    return config
