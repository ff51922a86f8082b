"""Writing keys and values into the paged cache."""

from __future__ import annotations

import torch

from tpmodel_worker.models.batch import LayerKvCache


def write_kv(key: torch.Tensor, value: torch.Tensor, cache: LayerKvCache, rows: torch.Tensor) -> None:
    """Stores this step's keys and values.

    Args:
        key: (T, kv_heads, head_dim) in the cache's dtype; need not be contiguous.
        value: as key.
        cache: one layer's.
        rows: (T,) int64, block * block_size + offset. Rows of the scratch block may repeat; which of their
            writes stays is undefined.
    """
    cache.keys.flatten(0, 1).index_copy_(0, rows, key)
    cache.values.flatten(0, 1).index_copy_(0, rows, value)
