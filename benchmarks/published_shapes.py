"""config.json of published models, without what does not change a step's time; and a small one to try programs with."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
_LINEAR_ATTENTION: dict[str, Any] = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
}

SHAPES: dict[str, dict[str, Any]] = {
    "small": _COMMON
    | {
        "model_type": "qwen3_moe",
        "vocab_size": 1024,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "qwen3-30b-a3b": _COMMON
    | {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    },
    "qwen3-next-80b-a3b": _COMMON
    | _LINEAR_ATTENTION
    | {
        "model_type": "qwen3_next",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 32,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
        "rope_theta": 10000000.0,
    },
    # A dense model of the Qwen3.5 family with 27 billion parameters.
    "qwen3.5-27b": _COMMON
    | _LINEAR_ATTENTION
    | {
        "model_type": "qwen3_5_text",
        "vocab_size": 248320,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 64,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0, "partial_rotary_factor": 0.25},
    },
}


def shape_of(name: str, *, layers: int = 0) -> dict[str, Any]:
    """The config of a model, as published or with fewer layers; layers 0: all.

    A number of layers that keeps the share of full-attention layers is a multiple of 4.
    """
    config = dict(SHAPES[name])
    if layers:
        config["num_hidden_layers"] = layers
    return config
