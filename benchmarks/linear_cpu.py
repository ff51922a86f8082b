"""Milliseconds for all linear layers of a 108 M parameter model, by number of rows: F.linear and ours.

python -m benchmarks.linear_cpu
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.linear import linear

SHAPES = [(1280, 768), (768, 768), (4608, 768), (768, 2304)] * 12 + [(32768, 768)]
ROUNDS = 9

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def milliseconds(product: Product, rows: dict[int, torch.Tensor], weights: list[torch.Tensor]) -> float:
    """One pass over all weights."""
    started = time.perf_counter()
    for weight in weights:
        product(rows[weight.shape[1]], weight)
    return 1000 * (time.perf_counter() - started)


def main() -> None:
    """Prints a table for one thread and one for all cores."""
    weights = [torch.randn(*shape) for shape in SHAPES]
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        print(f"{threads} threads\nrows  F.linear, ms  ours, ms", flush=True)
        for count in (1, 2, 4, 8, 16, 32, 64, 128, 512):
            rows = {inputs: torch.randn(count, inputs) for inputs in (768, 2304)}
            timings = [[milliseconds(product, rows, weights) for product in (F.linear, linear)] for _ in range(ROUNDS)]
            peer, ours = (statistics.median(column) for column in zip(*timings, strict=True))
            print(f"{count:4}  {peer:12.1f}  {ours:8.1f}", flush=True)


if __name__ == "__main__":
    main()
