"""Small random checkpoints of the real architecture, with a tokenizer, as folders on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

DEFAULT_VOCABULARY = 512

# The shapes that the issue names: each differs from the base in what its name says.
BASE: dict[str, Any] = {
    "vocab_size": DEFAULT_VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "kv_heads_fewer_than_ranks": {"num_key_value_heads": 1},
    "odd_vocabulary": {"vocab_size": 523},
    "yarn_rope": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 256,
        }
    },
    "wide_heads": {"head_dim": 32},
}

# Every other model_type, with every kind of layer that it has.
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
    "mlp_only_layers": [1],
}
_LINEAR, _FULL = "linear_attention", "full_attention"
# Value heads are twice the key heads and of another width: what mixes them up shows.
HYBRID: dict[str, Any] = BASE | {
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "layer_types": [_LINEAR, _LINEAR, _FULL, _LINEAR],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    # Half of the others': float32's error in the linear layers stays well below what counts as a tie.
    "initializer_range": 0.1,
}
HYBRID_EXPERTS: dict[str, Any] = {
    "num_experts": 9,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 44,
}
# As many as 2 and 4 ranks can share.
WHOLE_EXPERTS: dict[str, Any] = {"num_experts": 12}
VISION: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}


def with_vision(model_type: str, text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Settings of a checkpoint whose decoder has an object of its own, beside a vision encoder."""
    outer = {"model_type": model_type, "vision_config": VISION, "tie_word_embeddings": False}
    return outer | {"text_config": text} | changes


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": EXPERTS,
    "qwen3_next": {"model_type": "qwen3_next", "mlp_only_layers": [3]} | HYBRID | HYBRID_EXPERTS,
    "qwen3_5": with_vision("qwen3_5", HYBRID),
    "qwen3_5_moe": with_vision("qwen3_5_moe", HYBRID | HYBRID_EXPERTS),
    "qwen3_5_text": {"model_type": "qwen3_5_text"} | HYBRID,
    "qwen3_5_moe_text": {"model_type": "qwen3_5_moe_text"} | HYBRID | HYBRID_EXPERTS,
}


def make_checkpoint(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Writes a checkpoint with random weights; its norms are random too, so that a missed one shows."""
    torch.manual_seed(seed)
    model = random_model(**overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("A_log"):
                # A memory of some hundred tokens: what is left in it must show.
                parameter.uniform_(-6.0, -3.0)
    torch.nn.Module.to(model, dtype=dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder, model.config.get_text_config().vocab_size)
    return folder


def random_model(**overrides: Any) -> PreTrainedModel:
    """A model of transformers: Qwen3 of the base's shape but for the overrides, or another model_type."""
    if "text_config" in overrides:
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**overrides))
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**({"model_type": "qwen3"} | BASE | overrides)))


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, the rest two-letter pieces that nothing encodes to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    entries = {character: index for index, character in enumerate(alphabet)}
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = (first + second + third for first in letters for second in letters for third in letters)
    while len(entries) < vocabulary:
        entries[next(pieces)] = len(entries)
    tokenizer = Tokenizer(models.BPE(vocab=entries, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": False}))


def random_prompts(count: int, *, shortest: int, longest: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Prompts of mixed lengths; ids 0 and 1 (begin and end) are left out."""
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, longest) for _ in range(count)]
    return [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]
