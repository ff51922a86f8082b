"""Attention over the paged KV cache: one interface, chosen once for each batch."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from tpmodel_worker.models.batch import ForwardBatch, LayerKvCache


class PagedAttention(ABC):
    """Causal attention of one batch's tokens. Made once for a batch, used by every layer.

    What depends on the batch alone (indices, masks) is computed when it is made.
    """

    kv_rows: torch.Tensor
    """(T,) int64, where the layers write this step's keys and values before they attend."""

    def __init__(self, batch: ForwardBatch) -> None:
        self.kv_rows = batch.kv_rows

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerKvCache, scale: float
    ) -> torch.Tensor:
        """Attends to the sequences' cached keys and values, this step's included.

        Args:
            query: (T, heads, head_dim).
            key: (T, kv_heads, head_dim), which the cache already holds too; heads is a multiple of kv_heads.
            value: as key.
            cache: one layer's.
            scale: what products of queries and keys are multiplied by.

        Returns:
            (T, heads, head_dim), contiguous, in the query's dtype; accumulated in float32.
        """


def prepare_attention(batch: ForwardBatch, cache: LayerKvCache) -> PagedAttention:
    """The implementation for the cache's device; `cache` is any layer's.

    On CUDA nothing waits for the device.
    """
    if cache.keys.is_cuda:
        # Triton is neither needed nor installed everywhere without a GPU.
        from tpmodel_worker.kernels.attention_triton import TritonPagedAttention

        return TritonPagedAttention(batch)
    from tpmodel_worker.kernels.attention_torch import TorchPagedAttention

    return TorchPagedAttention(batch, cache)
