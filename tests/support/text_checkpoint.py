"""A checkpoint folder without weights: configuration, a small tokenizer, a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Schöne Grüße aus Köln, déjà vu à Besançon.",
    "你好世界 今天天气很好",
    "Emoji 🙂🚀👩‍👩‍👧 and more: ∑∞≈.",
    "User: hello\n\nAssistant: hi there, how are you?",
]
END = "<|end|>"
TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{ '<|start|>' + message.role + '\\n' + message.content + '<|end|>\\n' }}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant\\n' }}{%- endif -%}\n"
)
CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
}


def train_tokenizer(vocab_size: int = 420) -> Tokenizer:
    """A byte-level BPE that splits most characters outside ASCII into several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|start|>", END],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def write_text_checkpoint(folder: Path, **config: Any) -> Tokenizer:
    """Writes the folder and returns its tokenizer; keywords replace entries of config.json."""
    tokenizer = train_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "chat_template": TEMPLATE}))
    # A few ids more than the tokenizer has, as checkpoints with padded embeddings do.
    sizes = {"vocab_size": tokenizer.get_vocab_size() + 8, "eos_token_id": tokenizer.token_to_id(END)}
    (folder / "config.json").write_text(json.dumps(CONFIG | sizes | config))
    return tokenizer
