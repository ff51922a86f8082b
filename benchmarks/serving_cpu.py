"""Served tokens per second on the CPU against transformers `generate`, same checkpoint, threads and dtype.

    python -m benchmarks.serving_cpu

Mixed lengths: prompts of 32 to 512 tokens, outputs of 16 to 256; float32, greedy. Counted are useful tokens:
those that a request asked for, not the padding of a batch. Every run sends the same requests. Peer and
project take turns, so that a machine whose speed drifts treats them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tpmodel import AsyncClient
from tpmodel.local import LocalServer

VOCABULARY = 32768
MOST_CONCURRENT = 16


@dataclass(frozen=True, slots=True)
class Work:
    """One request: prompt ids and how many tokens it wants."""

    prompt: tuple[int, ...]
    output_tokens: int


Run = Callable[[Sequence[Work]], None]


def mixed_work(count: int, *, seed: int) -> list[Work]:
    """Requests of mixed lengths."""
    rng = random.Random(seed)
    return [
        Work(tuple(rng.randrange(2, VOCABULARY) for _ in range(rng.randint(32, 512))), rng.randint(16, 256))
        for _ in range(count)
    ]


def write_model(folder: Path) -> int:
    """A random Qwen3 of more than 100 million parameters; returns how many."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


class Transformers:
    """The peer."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def one_by_one(self, work: Sequence[Work]) -> None:
        """Each request alone, as its users get it without a server."""
        for item in work:
            self._generate([item])

    @torch.inference_mode()
    def padded_batch(self, work: Sequence[Work]) -> None:
        """All at once, padded on the left, as long as the longest wants."""
        self._generate(work)

    def _generate(self, work: Sequence[Work]) -> None:
        longest = max(len(item.prompt) for item in work)
        ids = torch.zeros(len(work), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(work):
            ids[row, longest - len(item.prompt) :] = torch.tensor(item.prompt)
            mask[row, longest - len(item.prompt) :] = 1
        tokens = max(item.output_tokens for item in work)
        self.model.generate(
            ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )


async def serve_work(target: str, work: Sequence[Work], concurrency: int) -> None:
    """Sends the requests through gRPC, that many at a time."""
    pending = iter(work)

    async def worker(client: AsyncClient) -> None:
        for item in pending:
            stream = client.generate(item.prompt, max_tokens=item.output_tokens, temperature=0, ignore_eos=True)
            result = await stream.result()
            assert len(result.token_ids[0]) == item.output_tokens

    async with AsyncClient(target) as client:
        await asyncio.gather(*(worker(client) for _ in range(concurrency)))


def useful_tokens_per_second(run: Run, work: Sequence[Work]) -> float:
    """Tokens that were asked for, over the time that the run took."""
    started = time.perf_counter()
    run(work)
    return sum(item.output_tokens for item in work) / (time.perf_counter() - started)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--tp", type=int, nargs="+", default=[2, 4], help="world sizes reported beside tp 1")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    work = mixed_work(arguments.requests, seed=2)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        parameters = write_model(folder)
        print(
            f"{parameters / 1e6:.0f} M parameters, float32, {torch.get_num_threads()} cores; {len(work)} requests, "
            f"{sum(len(item.prompt) for item in work)} prompt and {sum(item.output_tokens for item in work)} output "
            f"tokens; useful tokens/s, median of {arguments.rounds} rounds (least, most)",
            flush=True,
        )
        compare(folder, work, arguments.rounds)
        for tp in arguments.tp:
            report(folder, work, tp, arguments.rounds)


def compare(folder: Path, work: Sequence[Work], rounds: int) -> None:
    """tp 1 beside transformers, in turns, each with the same requests."""
    peer = Transformers(folder)
    with serving(folder, 1) as (alone, together):
        runs = {
            "transformers, one by one": peer.one_by_one,
            "tpmodel tp 1, one by one": alone,
            "transformers, padded batch": peer.padded_batch,
            f"tpmodel tp 1, {len(work)} at once": together,
        }
        figures = measure(runs, work, rounds)
    peer_alone, own_alone, peer_padded, own_together = (statistics.median(values) for values in figures.values())
    print(f"  one by one: {own_alone / peer_alone:.2f}x (goal 0.95)")
    print(f"  {len(work)} at once: {own_together / peer_alone:.2f}x of transformers one by one (goal 4), "
          f"{own_together / peer_padded:.2f}x of its padded batch (goal 1)", flush=True)  # fmt: skip


def report(folder: Path, work: Sequence[Work], tp: int, rounds: int) -> None:
    """Another world size on the same cores, by itself."""
    with serving(folder, tp) as (alone, together):
        runs = {f"tpmodel tp {tp}, one by one": alone, f"tpmodel tp {tp}, {len(work)} at once": together}
        measure(runs, work, rounds)


@contextlib.contextmanager
def serving(folder: Path, tp: int) -> Iterator[tuple[Run, Run]]:
    """A warm server; runs that send the requests one by one and all at once."""
    options = ["--dtype", "float32", "--no-prefix-cache", "--max-model-len", "1024", "--kv-cache-memory", "2Gi"]
    with LocalServer(folder, tp=tp, device="cpu", options=options) as server:

        def served(concurrency: int) -> Run:
            return lambda work: asyncio.run(serve_work(server.target, work, concurrency))

        served(4)(mixed_work(4, seed=9))
        yield served(1), served(MOST_CONCURRENT)


def measure(runs: Mapping[str, Run], work: Sequence[Work], rounds: int) -> dict[str, list[float]]:
    """Takes turns, and prints a line for each run."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            figures[name].append(useful_tokens_per_second(run, work))
    for name, values in figures.items():
        print(f"  {name:34} {statistics.median(values):8.1f} ({min(values):.1f}, {max(values):.1f})", flush=True)
    return figures


if __name__ == "__main__":
    main()
