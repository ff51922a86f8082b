"""A digest of a tensor's bits, exact on any device: changes with any changed or exchanged word."""

from __future__ import annotations

import torch

CHUNK_WORDS = 1 << 20
"""Words summed at a time; bounds the temporary memory to 16 bytes for each."""


def digest_bytes(data: torch.Tensor) -> torch.Tensor:
    """The sum over i of (2 i + 1) * word i, modulo 2^64.

    Words are 32-bit, little-endian, taken as signed; a last one that is not whole is filled with zeros.
    A change of one word changes the sum, since its weight is odd; so does the exchange of two unlike words.

    Args:
        data: (bytes,) uint8, contiguous, aligned to 4 bytes.

    Returns:
        () int64 on data's device: the sum's 64 bits. `unsigned` makes it a number.
    """
    whole = data.numel() // 4
    words = data[: whole * 4].view(torch.int32)
    weights = torch.arange(1, 2 * min(CHUNK_WORDS, whole + 1), 2, dtype=torch.int64, device=data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for start in range(0, whole, CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
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
