"""Trains the small Qwen3 checkpoint that `make run` serves, and writes it as a normal checkpoint folder.

    python examples/train_default_model.py --output examples/default_model

Takes about a quarter of an hour on one core. The result is under 5 MB: a byte-level BPE tokenizer of up to
2,048 entries, a chat template, and 1.5 million parameters in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from conversations import Conversation, conversations

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048
CONTEXT = 1024
# Splits letters, digits and the rest, as Qwen's tokenizers do.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def render(conversation: Conversation) -> str:
    """The conversation as the chat template writes it."""
    return (
        f"{TURN_START}user\n{conversation.question}{TURN_END}\n{TURN_START}assistant\n{conversation.answer}{TURN_END}\n"
    )


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer: every byte is an entry, so any text can be encoded.

    The conversations alone have too few words to fill the vocabulary: the language reference that comes with
    every Python adds merges for common English.
    """
    texts = [*texts, *topics.topics.values()]
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """Small, with grouped-query attention and a head size that is not hidden / heads."""
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(END_OF_TEXT),
        eos_token_id=tokenizer.token_to_id(TURN_END),
    )


def train(model: Qwen3ForCausalLM, ids: torch.Tensor, *, steps: int, batch: int, length: int) -> None:
    """Plain AdamW with warm-up and cosine decay over random windows of the token stream."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=0.05)
    peak, warm_up = 4e-3, 100
    generator = torch.Generator().manual_seed(1)
    started = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warm_up) / (steps - warm_up))
        rate = peak * min(1.0, (step + 1) / warm_up) * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - length - 1, (batch, 1), generator=generator)
        window = ids[starts + torch.arange(length)]
        loss = model(input_ids=window, labels=window).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.monotonic() - started:.0f} s", flush=True)


def write(model: Qwen3ForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Writes the folder as hubs hold it: weights, configs, tokenizer and chat template."""
    model.bfloat16().save_pretrained(output)
    tokenizer.save(str(output / "tokenizer.json"))
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    generation = {"eos_token_id": [tokenizer.token_to_id(TURN_END), tokenizer.token_to_id(END_OF_TEXT)]}
    generation |= {"do_sample": False, "pad_token_id": tokenizer.token_to_id(END_OF_TEXT)}
    (output / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def main() -> None:
    """Makes the corpus, trains tokenizer and model, writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    texts = [render(conversation) for conversation in conversations(count=12000, seed=7)]
    tokenizer = train_tokenizer(texts)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text).ids])
    torch.manual_seed(3)
    model = Qwen3ForCausalLM(model_config(tokenizer))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(ids)} tokens, vocabulary {tokenizer.get_vocab_size()}, {parameters} parameters", flush=True)
    train(model, ids, steps=arguments.steps, batch=16, length=128)
    write(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
