"""A digest of a tensor's bits, exact on any device: changes with any changed or exchanged word."""

from __future__ import annotations

from collections.abc import Mapping

import torch

HOST_CHUNK_WORDS = 1 << 18
"""Words summed at a time, which take 16 bytes each meanwhile: few enough for a CPU's cache."""
DEVICE_CHUNK_WORDS = 1 << 22
"""Enough to keep a GPU busy."""


def digest_bytes(data: torch.Tensor) -> torch.Tensor:
    """The sum over i of (2 i + 1) * word i, modulo 2^64.

    Words are 32-bit, little-endian, taken as signed; a last one that is not whole is filled with zeros.
    A change of one word changes the sum, since its weight is odd; so does the exchange of two unlike words.

    Args:
        data: (bytes,) uint8, contiguous, aligned to 4 bytes.

    Returns:
        () int64 on data's device: the sum's 64 bits. `unsigned` makes it a number.
    """
    chunk_words = DEVICE_CHUNK_WORDS if data.is_cuda else HOST_CHUNK_WORDS
    whole = data.numel() // 4
    words = data[: whole * 4].view(torch.int32)
    weights = torch.arange(1, 2 * min(chunk_words, whole + 1), 2, dtype=torch.int64, device=data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, whole, chunk_words):
        chunk = words[start : start + chunk_words]
        total += (chunk * weights[: chunk.numel()]).sum()
        # (2 (start + j) + 1) = 2 start + (2 j + 1)
        total += chunk.sum(dtype=torch.int64) * (2 * start)
    rest = data[whole * 4 :]
    if rest.numel():
        last = torch.zeros(4, dtype=torch.uint8, device=data.device)
        last[: rest.numel()] = rest
        total += last.view(torch.int32)[0] * (2 * whole + 1)
    return total


def unsigned(value: int) -> int:
    """The 64 bits of a signed number as an unsigned one."""
    return value % (1 << 64)


def shard_digest(digests: Mapping[str, int]) -> int:
    """One number for all tensors of a shard, from the digest of each by its name: their sum, modulo 2^64."""
    return unsigned(sum(digests.values()))
