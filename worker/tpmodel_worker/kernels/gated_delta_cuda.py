"""The gated delta rule on CUDA: kernels of our own for the convolution and for decodes, fla-core's for chunks.

fla-core multiplies in 16 bits or TF32: chunks of float32 models, and all chunks where fla-core is not installed, are
computed in plain torch, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from tpmodel_worker.kernels.fla_chunks import chunk_kernel
from tpmodel_worker.kernels.gated_delta import DeltaGates, GatedDelta
from tpmodel_worker.kernels.gated_delta_torch import PIECE, Pieces, cut_chunks, prefill_pieces, rule_inputs
from tpmodel_worker.kernels.gated_delta_triton import convolve_rows, decode_rows, keep_last_rows
from tpmodel_worker.models.batch import ForwardBatch, LayerState


class CudaGatedDelta(GatedDelta):
    """Index tensors of one batch; only small ones are copied from the host."""

    def __init__(self, batch: ForwardBatch, taps: int) -> None:
        self._batch = batch
        self._chunks = batch.decodes < len(batch.query_lengths)
        device, tokens = batch.token_ids.device, len(batch.token_ids)
        if self._chunks:
            sequences = torch.arange(len(batch.query_lengths), device=device)
            lengths = batch.query_starts.diff().long()
            self._owners = sequences.repeat_interleave(lengths, output_size=tokens)
            self._places = torch.arange(tokens, device=device) - batch.query_starts[self._owners]
        else:
            self._owners = torch.arange(tokens, device=device)
            self._places = torch.zeros_like(self._owners)

    def convolve(self, features: torch.Tensor, weight: torch.Tensor, state: LayerState) -> torch.Tensor:
        """See GatedDelta.convolve."""
        batch = self._batch
        output = convolve_rows(features, weight, state, batch.slots, self._owners, self._places, decodes=batch.decodes)
        if self._chunks:
            keep_last_rows(features, state, batch.slots, batch.query_starts, first=batch.decodes)
        return output

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, gates: DeltaGates, state: LayerState
    ) -> torch.Tensor:
        """See GatedDelta.attend."""
        decodes = self._batch.decodes
        output = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        if decodes:
            decode_rows(query, key, value, gates, state, self._batch.slots, output, rows=decodes)
        if self._chunks:
            kernel = None if value.dtype == torch.float32 else chunk_kernel()
            if kernel is None:
                inputs = rule_inputs(query, key, value, gates)
                output[decodes:] = prefill_pieces(self._pieces, inputs, state.recurrent)
            else:
                rows = (query[decodes:], key[decodes:], value[decodes:], gates.rows(decodes))
                output[decodes:] = self._attend_chunks(kernel, *rows, state)
        return output

    def _attend_chunks(
        self,
        kernel: Callable[..., Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        gates: DeltaGates,
        state: LayerState,
    ) -> torch.Tensor:
        """The chunks' rows by fla-core: (their tokens, value_heads, value_dim)."""
        slots = self._batch.slots[self._batch.decodes :]
        starts, pieces = self._fla_indices
        output, memory = kernel(
            q=query.unsqueeze(0),
            k=key.unsqueeze(0),
            v=value.unsqueeze(0),
            g=gates.decay().unsqueeze(0),
            beta=gates.beta().unsqueeze(0),
            initial_state=state.recurrent.index_select(0, slots),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=starts,
            chunk_indices=pieces,
        )
        state.recurrent.index_copy_(0, slots, memory)
        return output.squeeze(0)

    @functools.cached_property
    def _pieces(self) -> Pieces:
        return cut_chunks(self._batch)

    @functools.cached_property
    def _fla_indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(chunks + 1,) int32, where each chunk's rows start; (pieces, 2) int32, chunk and piece within it.

        Given nothing, fla-core would wait for the device to learn how many pieces there are.
        """
        batch = self._batch
        starts = batch.query_starts[batch.decodes :] - batch.decodes
        counts = [-(-length // PIECE) for length in batch.query_lengths[batch.decodes :]]
        chunks = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        within = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        pieces = torch.from_numpy(np.stack((chunks, within), axis=1)).pin_memory()
        return starts, pieces.to(starts.device, non_blocking=True)
