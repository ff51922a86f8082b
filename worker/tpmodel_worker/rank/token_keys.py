"""Values with their vocabulary ids packed into one integer each.

Comparing two keys compares the values, then, where these are equal, puts the lower id first. So a maximum or
a top-k over keys, in any order and over any shards, has exactly one result, and one gather moves both parts.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_WORD = 0xFFFFFFFF
_BELOW_SIGN = 0x7FFFFFFF
_ELEMENTS_PER_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 22}
"""Bounds the 64-bit temporaries of a batch: 1 MiB each on CPU, where they should stay in the cache, 32 MiB on CUDA."""


def ordered_bits(values: torch.Tensor) -> torch.Tensor:
    """float32 of any shape as int64 from -2^31 to 2^31 - 1 in the same order; 0.0 and -0.0 are equal."""
    bits = (values + 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & _BELOW_SIGN)).to(torch.int64)


def pack_keys(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 keys of float32 values and int64 vocabulary ids (0 to 2^32 - 1) that broadcast together."""
    return (ordered_bits(values) << 32) | (_WORD - ids)


def key_ids(keys: torch.Tensor) -> torch.Tensor:
    """The vocabulary ids of keys, int64."""
    return _WORD - (keys & _WORD)


def key_values(keys: torch.Tensor) -> torch.Tensor:
    """The values of keys, float32."""
    bits = (keys >> 32).to(torch.int32)
    return (bits ^ ((bits >> 31) & _BELOW_SIGN)).view(torch.float32)


def best_keys(values: torch.Tensor, first_id: int) -> torch.Tensor:
    """The key of each row's largest value: (R, C) float32 to (R,) int64. Column 0 has vocabulary id first_id."""
    columns = values.argmax(dim=-1, keepdim=True)  # the first of equal ones
    return pack_keys(values.gather(-1, columns), columns + first_id).squeeze(-1)


def top_keys(values: torch.Tensor, first_id: int, count: int) -> torch.Tensor:
    """The keys of each row's `count` largest values, best first: (R, C) float32 to (R, min(count, C)) int64."""
    rows, columns = values.shape
    ids = torch.arange(first_id, first_id + columns, device=values.device)
    count = min(count, columns)
    best = torch.empty(rows, count, dtype=torch.int64, device=values.device)
    for block in row_blocks(rows, columns, values.device):
        best[block] = pack_keys(values[block], ids).topk(count).values
    return best


def merge_top_keys(gathered: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` best, best first, of every rank's top_keys: (world, R, C) to (R, min(count, world * C))."""
    world, rows, columns = gathered.shape
    return gathered.permute(1, 0, 2).reshape(rows, world * columns).topk(min(count, world * columns)).values


def row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Splits the rows of a matrix so that 64-bit temporaries stay small. The same on every rank."""
    rows_per_block = max(1, _ELEMENTS_PER_BLOCK[device.type] // max(1, columns))
    for start in range(0, rows, rows_per_block):
        yield slice(start, min(start + rows_per_block, rows))
