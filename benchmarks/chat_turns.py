"""Chats with a hybrid model: time to the first token of every turn, with snapshots of its state and without.

    python -m benchmarks.chat_turns [--device cpu|cuda] [--tp 1] [--shape small] [--layers 0] [--turns 4] [--chats 5]

Each turn's prompt is the last one's with its answer and a question behind it, so that all but its end was computed
before. Two servers with dummy weights, one after the other: the first has no snapshots, so it computes every prompt
from its first token. One chat at a time; all chats are the same on both. On CUDA the shape is a published one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_checkpoint import write_dummy_checkpoint
from benchmarks.published_shapes import SHAPES, shape_of
from tpmodel import AsyncClient
from tpmodel.local import LocalServer

VOCABULARY = 2048
"""Of the tokenizer that the servers get; shapes may have more."""
ANSWER_TOKENS, QUESTION_TOKENS = 32, 40
SMALL: dict[str, Any] = {
    "model_type": "qwen3_5_text",
    "dtype": "float32",
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
HYBRID_SHAPES = ("small", *(name for name, shape in SHAPES.items() if "linear_num_key_heads" in shape))
SHAPE = {"cpu": "small", "cuda": "qwen3.5-27b"}
PROMPT_TOKENS = {"cpu": 1500, "cuda": 12000}
STEP_DEADLINE = "300"
"""Seconds: CPU ranks may be slower than anybody would serve with."""


@dataclass(slots=True)
class Turn:
    """One turn of all chats."""

    tokens: list[int] = field(default_factory=list[int])
    """Of each prompt."""
    cached: list[int] = field(default_factory=list[int])
    """Of these, tokens that were not computed."""
    seconds: list[float] = field(default_factory=list[float])
    """To the first token."""

    def in_words(self) -> str:
        """Median (least, most), in milliseconds."""
        values = (statistics.median(self.seconds), min(self.seconds), max(self.seconds))
        middle, least, most = (round(1000 * value) for value in values)
        return f"{middle} ({least}, {most})"


def main() -> None:
    """Serves twice and prints what each turn's first token took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tp", type=positive, default=1)
    parser.add_argument("--shape", choices=HYBRID_SHAPES, help="default: small, on cuda qwen3.5-27b")
    parser.add_argument("--layers", type=int, default=0, help="of a published shape: fewer, a multiple of 4")
    parser.add_argument("--turns", type=positive, default=4)
    parser.add_argument("--chats", type=positive, default=5)
    parser.add_argument("--prompt-tokens", type=positive, help="of the first turn; default: 1500, on cuda 12000")
    arguments = parser.parse_args()
    name = arguments.shape or SHAPE[arguments.device]
    tokens = arguments.prompt_tokens or PROMPT_TOKENS[arguments.device]
    config = SMALL if name == "small" else shape_of(name, layers=arguments.layers)
    longest = tokens + arguments.turns * (ANSWER_TOKENS + QUESTION_TOKENS)
    if longest > config["max_position_embeddings"]:
        parser.error(f"{longest} tokens in the last turn: {name} takes at most {config['max_position_embeddings']}")
    options = ["--max-model-len", str(longest), "--max-num-seqs", "8", "--step-deadline", STEP_DEADLINE]
    sides: list[list[Turn]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        write_dummy_checkpoint(Path(folder), config | {"bos_token_id": 0, "eos_token_id": 1})
        for more in (["--state-snapshots", "0"], []):
            options_here = ["--load-format", "dummy", *options, *more]
            with LocalServer(folder, tp=arguments.tp, device=arguments.device, options=options_here) as server:
                sides.append(asyncio.run(hold_chats(server.target, arguments.chats, arguments.turns, tokens)))
    print(f"{name}, tp {arguments.tp} on {arguments.device}; ms to the first token, median (least, most)")
    print_table(*sides)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value}: at least 1")
    return value


def print_table(without: Sequence[Turn], kept: Sequence[Turn]) -> None:
    """One line for each turn."""
    print(f"{'turn':>5} {'tokens':>8} {'no snapshots':>22} {'snapshots':>22} {'cached':>8} {'faster':>7}")
    for number, (plain, fast) in enumerate(zip(without, kept, strict=True), start=1):
        tokens, cached = round(statistics.median(plain.tokens)), round(statistics.median(fast.cached))
        times = statistics.median(plain.seconds) / statistics.median(fast.seconds)
        print(f"{number:>5} {tokens:>8} {plain.in_words():>22} {fast.in_words():>22} {cached:>8} {times:>6.2f}x")


async def hold_chats(target: str, chats: int, turns: int, prompt_tokens: int) -> list[Turn]:
    """Every turn of so many chats, and of one more before them, which counts for nothing."""
    draw = random.Random(1)
    measured = [Turn() for _ in range(turns)]
    async with AsyncClient(target) as client:
        for chat, prompt in enumerate(draw_ids(draw, prompt_tokens) for _ in range(chats + 1)):
            for turn in measured if chat else itertools.repeat(Turn(), turns):
                await ask(client, prompt, turn)
                prompt += draw_ids(draw, QUESTION_TOKENS)
    return measured


def draw_ids(draw: random.Random, count: int) -> list[int]:
    """Token ids of anything but the special ones."""
    return [draw.randrange(2, VOCABULARY) for _ in range(count)]


async def ask(client: AsyncClient, prompt: list[int], turn: Turn) -> None:
    """Appends the answer to the prompt, and what it took to the turn."""
    started, first = time.perf_counter(), 0.0
    stream = client.generate(tuple(prompt), max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    async for chunk in stream:
        if chunk.token_ids and not first:
            first = time.perf_counter() - started
    result = await stream.result()
    turn.tokens.append(len(prompt))
    turn.cached.append(result.completion.usage.cached_tokens)
    turn.seconds.append(first)
    prompt += result.token_ids[0]


if __name__ == "__main__":
    main()
