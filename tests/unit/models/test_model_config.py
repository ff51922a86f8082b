"""config.json: every key is honoured, known to be without effect, or refused by name."""

import json
import subprocess
import sys

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from tpmodel_worker.models.config import (
    ConfigError,
    GenerationDefaults,
    longest_context,
    parse_model_config,
    read_model_config,
    world_sizes_that_work,
)

# As published for a model of 8 billion parameters, in the older spelling.
OLDER = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def parse(changes=(), *, world_size=1, **more):
    return parse_model_config({**OLDER, **dict(changes)}, world_size=world_size, **more)


def test_a_published_config_is_read():
    config = parse()
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.dtype, config.eos_token_ids, config.rope.theta) == ("bfloat16", (151645,), 1e6)
    assert config.max_model_len == 40960


def test_older_and_newer_spelling_mean_the_same():
    newer = {key: value for key, value in OLDER.items() if key not in ("rope_theta", "rope_scaling", "torch_dtype")}
    newer |= {"dtype": "bfloat16", "rope_parameters": {"rope_type": "default", "rope_theta": 1000000}}
    assert parse_model_config(newer, world_size=1) == parse()


@pytest.mark.parametrize("whole", [True, False])
def test_what_transformers_writes_is_read(whole):
    written = Qwen3Config(num_hidden_layers=2, num_key_value_heads=8).to_json_string(use_diff=not whole)
    assert parse_model_config(json.loads(written), world_size=4).num_hidden_layers == 2


def test_an_unsupported_model_type_names_the_supported_ones():
    """P9."""
    with pytest.raises(ConfigError, match=r"model_type 'llama' is not supported; supported: qwen3"):
        parse({"model_type": "llama"})
    with pytest.raises(ConfigError, match="model_type None"):
        parse({"model_type": None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architectures", ["Qwen3ForSequenceClassification"]),
        ("attention_bias", True),
        ("chunk_size_feed_forward", 2),
        ("dtype", "float64"),
        ("head_dim", 63),
        ("hidden_act", "gelu"),
        ("hidden_size", 4096.5),
        ("is_encoder_decoder", True),
        ("layer_types", ["full_attention"] * 35 + ["sliding_attention"]),
        ("layer_types", ["full_attention"] * 35),
        ("no_such_key", 0),
        ("num_attention_heads", "32"),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", True),
        ("auto_map", {"AutoModelForCausalLM": "other.py"}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "fp8"}),
        ("rms_norm_eps", 0),
        ("tie_word_embeddings", 1),
        ("torch_dtype", "int8"),
        ("use_sliding_window", True),
        ("eos_token_id", 151936),
        ("eos_token_id", [1, "2"]),
    ],
)
def test_a_value_that_is_not_honoured_is_refused_by_key_and_value(key, value):
    with pytest.raises(ConfigError) as refusal:
        parse({key: value})
    assert key.removeprefix("torch_") in str(refusal.value)
    assert str(value) in str(refusal.value) or repr(value) in str(refusal.value)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"])
def test_a_missing_size_is_named(key):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse({key: None})


def test_attention_dropout_acts_in_training_only():
    assert parse({"attention_dropout": 0.1}) == parse()


def test_sliding_window_settings_without_use_sliding_window_have_no_effect():
    assert parse({"sliding_window": 4096, "max_window_layers": 3}) == parse()


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, "rope_type 'longrope' is not supported; supported: default, linear"),
        ({"rope_type": "mrope"}, "rope_type 'mrope' is not supported"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 32}, "beta_fast = 32"),
        ({"rope_type": "linear", "factor": -2.0}, "factor = -2.0"),
        ({"rope_type": "yarn", "type": "linear", "factor": 2.0}, "contradicts rope_type"),
        ({"type": "default", "rope_theta": 5}, "rope_theta = 1000000: contradicts"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}, "high_freq_factor"),
        ([], r"rope_scaling = \[\]: expected an object"),
    ],
)
def test_rope_settings_that_are_not_honoured_are_refused(rope, message):
    with pytest.raises(ConfigError, match=message):
        parse({"rope_scaling": rope})


def test_yarn_reaches_the_stretched_context():
    """Published configs keep max_position_embeddings below what the scaling is made for."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = parse({"rope_scaling": yarn})
    assert longest_context(config) == config.max_model_len == 131072


def test_a_context_longer_than_the_positions_is_refused_with_both_numbers():
    with pytest.raises(ConfigError, match="50000 is more than the 40960"):
        parse(max_model_len=50000)
    with pytest.raises(ConfigError, match="-1"):
        parse(max_model_len=-1)
    assert parse(max_model_len=1000).max_model_len == 1000


@pytest.mark.parametrize("world_size", [0, -1])
def test_a_world_size_below_one_is_refused(world_size):
    """P2."""
    with pytest.raises(ConfigError, match=f"world size {world_size}"):
        parse(world_size=world_size)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, "world size 3: num_attention_heads 32 is not divisible by it; sizes that work: 1, 2, 4, 8, 16, 32"),
        ({"intermediate_size": 12290}, 4, "intermediate_size 12290 .* sizes that work: 1, 2$"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 6, "intermediate_size": 12},
            4,
            "world size 4: num_key_value_heads 6 is not divisible by it; sizes that work: 1, 2, 3, 6, 12",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3, "intermediate_size": 12},
            4,
            "world size 4: it is not a multiple of num_key_value_heads 3; sizes that work: 1, 3, 6, 12",
        ),
        ({"num_attention_heads": 32, "num_key_value_heads": 5}, 1, "32 is not a multiple of num_key_value_heads 5"),
    ],
)
def test_a_world_that_cannot_share_the_model_is_refused_with_the_numbers(changes, world_size, message):
    """P2."""
    with pytest.raises(ConfigError, match=message):
        parse(changes, world_size=world_size)


def test_fewer_kv_heads_than_ranks_are_replicated_where_they_divide_the_ranks():
    assert parse({"num_key_value_heads": 2}, world_size=8).num_key_value_heads == 2
    assert world_sizes_that_work(parse({"num_key_value_heads": 2})) == [1, 2, 4, 8, 16, 32]


def test_generation_config_wins_over_config_for_end_of_sequence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(OLDER))
    assert read_model_config(tmp_path, world_size=1).eos_token_ids == (151645,)
    generation = {"eos_token_id": [151645, 151643], "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps({**generation, "transformers_version": "4.51.0"}))
    config = read_model_config(tmp_path, world_size=1)
    assert config.eos_token_ids == (151645, 151643)
    assert config.generation == GenerationDefaults(do_sample=True, temperature=0.6, top_k=20, top_p=0.95)


@pytest.mark.parametrize(("key", "value"), [("top_p", 1.5), ("top_k", -3), ("temperature", -1), ("do_sample", "yes")])
def test_generation_defaults_are_checked(key, value):
    with pytest.raises(ConfigError, match=f"generation_config.json: {key}"):
        parse(generation_config={key: value})


@pytest.mark.parametrize("text", [None, "{", "[]", "\xff"])
def test_an_unreadable_config_names_the_file(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"config\.json"):
        read_model_config(tmp_path, world_size=1)


# As published for a model of 30 billion parameters, 3 of them active.
EXPERTS = {
    **{key: value for key, value in OLDER.items() if key != "max_window_layers"},
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}


def parse_experts(changes=(), *, world_size=1):
    return parse_model_config({**EXPERTS, **dict(changes)}, world_size=world_size)


def test_a_published_config_with_experts_is_read():
    experts = parse_experts().experts
    assert experts is not None
    assert (experts.count, experts.per_token, experts.intermediate_size) == (128, 8, 768)
    assert experts.normalise_weights
    assert experts.layers == tuple(range(48))


@pytest.mark.parametrize("whole", [True, False])
def test_what_transformers_writes_of_experts_is_read(whole):
    written = Qwen3MoeConfig(num_hidden_layers=2, num_experts=12).to_json_string(use_diff=not whole)
    experts = parse_model_config(json.loads(written), world_size=4).experts
    assert experts is not None
    assert (experts.count, experts.normalise_weights) == (12, False)


@pytest.mark.parametrize(
    ("step", "dense", "layers"), [(1, [], (0, 1, 2, 3, 4)), (2, [], (1, 3)), (1, [0, 3], (1, 2, 4)), (2, [1], (3,))]
)
def test_which_layers_have_experts(step, dense, layers):
    config = parse_experts({"num_hidden_layers": 5, "decoder_sparse_step": step, "mlp_only_layers": dense})
    assert config.experts is not None
    assert config.experts.layers == layers
    assert config.has_dense_layers == (len(layers) < 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": None}, "num_experts is missing"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok = 129: there are only 128 experts"),
        ({"num_local_experts": 64}, "num_local_experts = 64: contradicts num_experts = 128"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers = \[48\]: expected a list of layers from 0 to 47"),
        ({"mlp_only_layers": 3}, "mlp_only_layers = 3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step = 0"),
        ({"norm_topk_prob": 1}, "norm_topk_prob = 1"),
        ({"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
    ],
)
def test_expert_settings_that_are_not_honoured_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        parse_experts(changes)


def test_a_world_that_cannot_share_the_experts_is_refused_with_the_sizes_that_can():
    """P2."""
    message = "world size 16: moe_intermediate_size 712 is not divisible by it; sizes that work: 1, 2, 4, 8"
    with pytest.raises(ConfigError, match=message):
        parse_experts({"moe_intermediate_size": 712}, world_size=16)


def test_a_size_that_no_layer_has_does_not_bound_the_world():
    assert parse_experts({"intermediate_size": 6143}, world_size=4).num_hidden_layers == 48
    with pytest.raises(ConfigError, match="intermediate_size 6143 is not divisible"):
        parse_experts({"intermediate_size": 6143, "mlp_only_layers": [0]}, world_size=4)


def test_reading_a_config_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; import tpmodel_worker.models.config"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
