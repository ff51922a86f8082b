"""What no step can be faster than: its bytes at the device's copy bandwidth, its products at its matrix rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.own_steps import OwnSteps

_COPIED_BYTES = 2 << 30
_MATRIX = 8192
_ROUNDS = 10


class StepFloor:
    """Of one rank's shard. Bytes and products of attention, which are small here, count as bytes of KV only."""

    def __init__(self, own: OwnSteps, dtype: torch.dtype) -> None:
        self._own = own
        small = own.device.type == "cpu"
        self.bandwidth = copy_bandwidth(own.device, _COPIED_BYTES >> (6 if small else 0))
        """Bytes read and written each second."""
        self.products = matrix_rate(own.device, dtype, _MATRIX >> (4 if small else 0))
        """Multiplications and additions each second."""
        self._dense = self._experts = 0
        for name, parameter in own.model.named_parameters():
            if ".experts." in name:
                self._experts += parameter.nbytes
            elif "embed_tokens" not in name or own.model.config.tie_word_embeddings:
                self._dense += parameter.nbytes
        self._item = dtype.itemsize

    def decode(self, batch: int, context: int) -> float:
        """Seconds: weights once (of the experts those that uniform routing meets), states twice, KV once."""
        shape = self._own.kv_shape
        kv = batch * context * shape.block_bytes / shape.block_size
        states = 0.0
        if shape.states is not None:
            states = 2 * batch * shape.states.bytes / shape.states.slots
        return (self._dense + self._experts * self._met(batch) + kv + states) / self.bandwidth

    def prefill(self, tokens: int) -> float:
        """Seconds: the larger of the weights' bytes and every token's products."""
        read = (self._dense + self._experts * self._met(tokens)) / self.bandwidth
        weights = (self._dense + self._experts * self._share) / self._item
        return max(read, 2 * weights * tokens / self.products)

    @property
    def _share(self) -> float:
        """Of the experts, those that compute a token."""
        experts = self._own.model.config.experts
        return experts.per_token / experts.count if experts is not None else 0.0

    def _met(self, tokens: int) -> float:
        """Of the experts, those that compute any of so many tokens."""
        return 1 - math.pow(1 - self._share, tokens)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes read and written each second by a copy of `size` bytes, the best of some rounds."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(device, lambda: target.copy_(source))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Multiplications and additions each second of a square product, the best of some rounds."""
    first, second = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / _best(device, lambda: first @ second)


def _best(device: torch.device, work: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
