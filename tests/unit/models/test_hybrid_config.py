"""config.json of models with linear and full attention."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from transformers import AutoConfig

from tpmodel_worker.models.config import ConfigError, parse_model_config, world_sizes_that_work

PATTERN = ["linear_attention"] * 3 + ["full_attention"]

# As published for 80 billion parameters, 3 of them active, in the older spelling.
NEXT: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# As published for 27 billion parameters; the vision encoder's object is cut short.
DENSE: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 248056,
    "model_type": "qwen3_5",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 17408,
        "layer_types": PATTERN * 16,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 48,
        "linear_value_head_dim": 128,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "mlp_only_layers": [],
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 64,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
        "use_cache": True,
        "vocab_size": 248320,
    },
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 248057,
    "vision_config": {"depth": 27, "model_type": "qwen3_5"},
    "vision_end_token_id": 248054,
    "vision_start_token_id": 248053,
}
_EXPERTS = {
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 2,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
}
SPARSE: dict[str, Any] = DENSE | {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "model_type": "qwen3_5_moe",
    "text_config": {key: value for key, value in DENSE["text_config"].items() if key != "intermediate_size"} | _EXPERTS,
}


def parse(config, changes=(), *, text=(), world_size=1):
    changed = copy.deepcopy(config) | dict(changes)
    if text:
        changed["text_config"] |= dict(text)
    return parse_model_config(changed, world_size=world_size)


def test_a_published_config_of_qwen3_next_is_read():
    config = parse(NEXT, world_size=4)
    linear, experts = config.linear_attention, config.experts
    assert linear is not None
    assert experts is not None
    assert linear.layers == tuple(layer for layer in range(48) if layer % 4 != 3)
    assert (linear.key_heads, linear.value_heads, linear.key_features, linear.value_features) == (16, 32, 2048, 4096)
    assert (experts.count, experts.per_token, experts.shared_intermediate_size) == (512, 10, 512)
    assert (config.rope.theta, config.rope.partial_rotary_factor) == (1e7, 0.25)


def test_a_published_config_of_qwen3_5_is_read():
    config = parse(DENSE, world_size=4)
    assert config.linear_attention is not None
    assert config.linear_attention.value_heads == 48
    assert (config.experts, config.intermediate_size, config.dtype) == (None, 17408, "bfloat16")
    assert (config.eos_token_ids, config.rope.partial_rotary_factor) == ((248044,), 0.25)


def test_a_published_config_of_qwen3_5_moe_is_read():
    config = parse(SPARSE, world_size=4)
    assert config.experts is not None
    assert config.experts.layers == tuple(range(64))
    assert config.experts.normalise_weights
    assert not config.has_dense_layers


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_what_transformers_writes_is_read(model_type, whole):
    written = AutoConfig.for_model(model_type).to_json_string(use_diff=not whole)
    assert parse_model_config(json.loads(written), world_size=2).linear_attention is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": PATTERN * 11}, "layer_types = .*: expected 48 times linear_attention or full_attention"),
        ({"layer_types": ["sliding_attention"] * 48}, "layer_types"),
        ({"layer_types": ["linear_attention"] * 48}, "expected both linear_attention and full_attention"),
        ({"full_attention_interval": 1}, "expected both"),
        ({"linear_num_value_heads": 24}, "linear_num_value_heads = 24: not a multiple of linear_num_key_heads 16"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim = 1: expected a whole number of at least 2"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5"),
        ({"partial_rotary_factor": 0.001}, "0 of 256 dimensions"),
        ({"shared_expert_intermediate_size": None}, "shared_expert_intermediate_size is missing"),
        ({"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16': only 'float32'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ],
)
def test_settings_of_qwen3_next_that_are_not_honoured_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse(NEXT, changes)


@pytest.mark.parametrize(
    ("config", "changes", "text", "message"),
    [
        (DENSE, {"text_config": None}, {}, "text_config = None: expected an object"),
        (DENSE, {}, {"no_such_key": 1}, "config.json: text_config: no_such_key = 1"),
        (DENSE, {"no_such_key": 1}, {}, "config.json: no_such_key = 1"),
        (DENSE, {}, {"model_type": "qwen3_5_moe_text"}, "text_config: model_type = 'qwen3_5_moe_text'"),
        (DENSE, {}, {"attn_output_gate": False}, "attn_output_gate = False"),
        (DENSE, {}, {"mlp_only_layers": [1]}, r"mlp_only_layers = \[1\]"),
        (DENSE, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, "contradicts text_config"),
        (DENSE, {"dtype": "float32"}, {}, "dtype = 'float32': contradicts text_config.dtype = 'bfloat16'"),
        (DENSE, {"architectures": ["Qwen3_5ForSequenceClassification"]}, {}, "architectures"),
        (DENSE, {}, {"num_experts": 8}, "num_experts = 8"),
        (SPARSE, {}, {"norm_topk_prob": False}, "norm_topk_prob = False"),
        (SPARSE, {}, {"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
    ],
)
def test_settings_of_qwen3_5_that_are_not_honoured_are_refused(config, changes, text, message):
    with pytest.raises(ConfigError, match=message):
        parse(config, changes, text=text)


def test_what_the_object_around_the_decoder_says_counts_for_it():
    config = parse(
        DENSE, {"dtype": "float16", "eos_token_id": [1, 2], "tie_word_embeddings": True}, text={"dtype": None}
    )
    assert (config.dtype, config.eos_token_ids, config.tie_word_embeddings) == ("float16", (1, 2), True)


@pytest.mark.parametrize(
    ("config", "text", "world_size", "message"),
    [
        (NEXT, {}, 32, "num_attention_heads 16 is not divisible by it; sizes that work: 1, 2, 4, 8, 16"),
        (NEXT | {"linear_num_key_heads": 4}, {}, 8, "linear_num_key_heads 4 .* sizes that work: 1, 2, 4$"),
        (NEXT | {"shared_expert_intermediate_size": 68}, {}, 8, "shared_expert_intermediate_size 68 .*: 1, 2, 4$"),
        (DENSE, {}, 3, "intermediate_size 17408 .* sizes that work: 1, 2, 4, 8$"),
        (SPARSE, {"moe_intermediate_size": 258}, 4, "moe_intermediate_size 258 .* sizes that work: 1, 2$"),
    ],
)
def test_a_world_that_cannot_share_the_model_is_refused_with_the_sizes_that_can(config, text, world_size, message):
    """P2."""
    with pytest.raises(ConfigError, match=f"world size {world_size}: .*{message}"):
        parse(config, text=text, world_size=world_size)


def test_world_sizes_of_published_shapes():
    assert world_sizes_that_work(parse(NEXT)) == [1, 2, 4, 8, 16]
    assert world_sizes_that_work(parse(DENSE)) == [1, 2, 4, 8]
    assert world_sizes_that_work(parse(SPARSE)) == [1, 2, 4, 8, 16]
