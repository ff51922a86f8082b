"""Milliseconds that one call of the sampler takes on CPU, one rank: python benchmarks/sampling_cpu.py [--threads N]."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tpmodel.v1 import worker_pb2
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.rank.sampling import Sampler

CPU = torch.device("cpu")
SETTINGS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 50": {"temperature": 0.8, "top_k": 50},
    "top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "min_p 0.05": {"temperature": 0.8, "min_p": 0.05},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.1, "frequency_penalty": 0.1},
    "5 logprobs": {"temperature": 0.0, "logprobs": 5},
}
BATCHES = (1, 16)
VOCAB_SIZES = (4096, 151_936)


def milliseconds(vocab_size: int, batch: int, settings: dict[str, float], repeats: int) -> float:
    """Median over the repeats."""
    sampler = Sampler(
        SingleCommunicator(CPU),
        vocab_size=vocab_size,
        vocab_start=0,
        vocab_shard=vocab_size,
        max_slots=batch,
        device=CPU,
    )
    defaults = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 1000, "logprobs": -1}
    for slot in range(batch):
        message = worker_pb2.SlotSampling(**{**defaults, **settings, "seed": slot})  # pyright: ignore[reportArgumentType]
        sampler.admit(slot, message, range(100), [])
    logits = torch.randn(batch, vocab_size) * 3
    active = torch.ones(batch, dtype=torch.bool)
    seconds: list[float] = []
    for step in range(repeats + 2):
        counts = torch.full((batch,), step)
        start = time.perf_counter()
        sampler.sample(logits, slots=range(batch), output_counts=counts, active=active)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:]) * 1000


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default 1)")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    columns = [(vocab_size, batch) for vocab_size in VOCAB_SIZES for batch in BATCHES]
    print(f"ms per call, {options.threads} thread(s), median of {options.repeats}")
    print("| sampling | " + " | ".join(f"{vocab_size:,} x {batch}" for vocab_size, batch in columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    with torch.inference_mode():
        for name, settings in SETTINGS.items():
            times = [milliseconds(vocab_size, batch, settings, options.repeats) for vocab_size, batch in columns]
            print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in times) + " |", flush=True)


if __name__ == "__main__":
    main()
