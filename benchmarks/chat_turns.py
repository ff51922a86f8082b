"""Chats with a hybrid model: seconds to the first token of every turn, with snapshots of its state and without.

    python -m benchmarks.chat_turns [--chats 5] [--prompt-tokens 1500]

Each turn's prompt is the last one's with its answer and some more tokens, so that all but the end could be kept. One
chat at a time; dummy weights on one rank of the CPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tpmodel import AsyncClient
from tpmodel.local import LocalServer

DEFAULT_MODEL = Path(__file__).parent.parent / "examples" / "default_model"
VOCABULARY, TURNS, ANSWER_TOKENS, QUESTION_TOKENS = 2048, 3, 32, 40
CONFIG: dict[str, Any] = {
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
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    """Serves twice and prints what each turn's first token took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="of the first turn")
    arguments = parser.parse_args()
    print(f"{'snapshots':>12}" + "".join(f"{f'turn {turn}':>24}" for turn in range(1, TURNS + 1)))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(DEFAULT_MODEL / file, folder)
        for label, more in (("none", ["--state-snapshots", "0"]), ("as planned", [])):
            options = ["--load-format", "dummy", "--max-num-seqs", "8", "--max-model-len", "4096", *more]
            options += ["--max-num-batched-tokens", "512", "--step-deadline", "300"]
            with LocalServer(folder, tp=1, device="cpu", options=options) as server:
                turns = asyncio.run(chats(server.target, arguments.chats, arguments.prompt_tokens))
            print(f"{label:>12}" + "".join(f"{in_words(seconds):>24}" for seconds in turns), flush=True)


def in_words(seconds: list[float]) -> str:
    """Median (least, most), in milliseconds."""
    middle, least, most = (round(1000 * value) for value in (statistics.median(seconds), min(seconds), max(seconds)))
    return f"{middle} ms ({least}, {most})"


async def chats(target: str, count: int, prompt_tokens: int) -> list[list[float]]:
    """For each turn, the seconds to the first token in every chat; one more chat before them counts for nothing."""
    draw = random.Random(1)
    turns: list[list[float]] = [[] for _ in range(TURNS)]
    async with AsyncClient(target) as client:
        for chat in range(count + 1):
            prompt = [draw.randrange(2, VOCABULARY) for _ in range(prompt_tokens)]
            for seconds in turns:
                answer, first = await ask(client, prompt)
                prompt += [*answer, *(draw.randrange(2, VOCABULARY) for _ in range(QUESTION_TOKENS))]
                if chat:
                    seconds.append(first)
    return turns


async def ask(client: AsyncClient, prompt: list[int]) -> tuple[list[int], float]:
    """The answer's tokens, and the seconds to its first one."""
    started, first = time.perf_counter(), 0.0
    stream = client.generate(list(prompt), max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True)
    async for _ in stream:
        first = first or time.perf_counter() - started
    return list((await stream.result()).token_ids[0]), first


if __name__ == "__main__":
    main()
