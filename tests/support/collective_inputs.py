"""Inputs of collectives that every rank can compute for all the others, and their sum in the ranks' order."""

from __future__ import annotations

import torch


def rank_input(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of very different sizes, so that another order of additions shows."""
    generator = torch.Generator().manual_seed(1000 * rank + count % 997)
    if dtype is torch.int64:
        return torch.randint(-(2**60), 2**60, (count,), generator=generator)
    numbers = torch.randn(count, generator=generator, dtype=torch.float64)
    scales = torch.randint(-4, 4, (count,), generator=generator)
    return (numbers * torch.exp2(scales.double())).to(dtype)


def expected_sum(world_size: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Rank 0 to the last, half types in float32 and rounded once."""
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    total = rank_input(0, count, dtype).to(wide)
    for rank in range(1, world_size):
        total = total + rank_input(rank, count, dtype).to(wide)
    return total.to(dtype)
