"""Builds the ForwardBatch of a step from the slots and the plan's rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.models.batch import ForwardBatch
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.slots import SlotTable
from tpmodel_worker.rank.upload import upload


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The decoding slots of a plan; D of them."""

    slots: np.ndarray
    """(D,) int64."""
    index: torch.Tensor
    """(D,) int64, slots on the device."""
    table_starts: torch.Tensor
    """(D,) int64, where each slot's row of the flattened block tables starts."""
    scratch: torch.Tensor
    """(D,) int64, rows of the scratch block, for slots that idle."""


@dataclass(frozen=True, slots=True)
class ChunkRows:
    """The prefill chunks of a step: C chunks, P tokens together."""

    slots: np.ndarray
    """(C,) int64."""
    index: torch.Tensor
    """(C,) int64, slots on the device."""
    lengths: tuple[int, ...]
    ends: np.ndarray
    """(C,) int64, computed lengths after the step."""
    end_tensor: torch.Tensor
    """(C,) int64, ends on the device."""
    token_ids: torch.Tensor
    """(P,) int64."""
    positions: torch.Tensor
    """(P,) int64."""
    kv_rows: torch.Tensor
    """(P,) int64."""
    completing: np.ndarray
    """Indices into the chunks that reach the last known token, and so sample."""


@dataclass(frozen=True, slots=True)
class _Part:
    """The fields of a batch that decodes and chunks both have."""

    index: torch.Tensor
    token_ids: torch.Tensor
    positions: torch.Tensor
    kv_rows: torch.Tensor
    kv_lengths: torch.Tensor


class StepBatchBuilder:
    """Keeps what does not change from step to step."""

    def __init__(self, slots: SlotTable, limits: PlanLimits, device: torch.device) -> None:
        self._slots = slots
        self._device = device
        self._block_size = limits.slots.block_size
        self._max_blocks = limits.slots.max_blocks
        self._scratch_start = limits.slots.num_blocks * self._block_size
        self._arange = torch.arange(limits.slots.max_slots + 1, device=device)
        self._arange32 = self._arange.to(torch.int32)
        self._decodes: DecodeRows | None = None

    def decodes(self, decode_slots: Sequence[int]) -> DecodeRows | None:
        """The rows for a plan's decode_slots; None where it has none. Mostly those of the plan before."""
        if not decode_slots:
            return None
        slots = np.array(decode_slots, dtype=np.int64)
        rows = self._decodes
        if rows is None or not np.array_equal(rows.slots, slots):
            scratch = self._scratch_start + np.arange(len(slots), dtype=np.int64) % self._block_size
            index, starts, scratch_rows = upload([slots, slots * self._max_blocks, scratch], self._device)
            rows = self._decodes = DecodeRows(slots=slots, index=index, table_starts=starts, scratch=scratch_rows)
        return rows

    def chunks(self, prefill_chunks: Sequence[pb.PrefillChunk]) -> ChunkRows | None:
        """The rows for a plan's prefill chunks; None where it has none."""
        if not prefill_chunks:
            return None
        host = self._slots.host
        slots = np.array([chunk.slot for chunk in prefill_chunks], dtype=np.int64)
        lengths = tuple(chunk.length for chunk in prefill_chunks)
        starts = host.computed[slots]
        ends = starts + lengths
        tokens: list[np.ndarray] = []
        positions: list[np.ndarray] = []
        kv_rows: list[np.ndarray] = []
        for slot, start, end in zip(slots.tolist(), starts.tolist(), ends.tolist(), strict=True):
            span = np.arange(start, end, dtype=np.int64)
            blocks = host.block_tables[slot, span // self._block_size].astype(np.int64)
            tokens.append(host.tokens[slot][start:end])
            positions.append(span)
            kv_rows.append(blocks * self._block_size + span % self._block_size)
        arrays = [slots, ends, np.concatenate(tokens), np.concatenate(positions), np.concatenate(kv_rows)]
        index, end_tensor, token_ids, position_ids, rows = upload(arrays, self._device)
        return ChunkRows(
            slots=slots,
            index=index,
            lengths=lengths,
            ends=ends,
            end_tensor=end_tensor,
            token_ids=token_ids,
            positions=position_ids,
            kv_rows=rows,
            completing=np.flatnonzero(ends == host.known[slots]),
        )

    def build(self, decodes: DecodeRows | None, active: torch.Tensor | None, chunks: ChunkRows | None) -> ForwardBatch:
        """The batch of one step.

        Args:
            decodes: the decoding slots, first in the batch.
            active: (D,) bool on the device, False for slots that have finished.
            chunks: the prefill chunks.
        """
        host = self._slots.host
        parts: list[_Part] = []
        longest, decode_count = 0, 0
        query_lengths: tuple[int, ...] = ()
        if decodes is not None and active is not None:
            decode_count = len(decodes.slots)
            longest = int(np.minimum(host.computed[decodes.slots] + 1, host.most_computed[decodes.slots]).max())
            query_lengths = (1,) * decode_count
            parts.append(self._decode_part(decodes, active))
        if chunks is not None:
            longest = max(longest, int(chunks.ends.max()))
            query_lengths += chunks.lengths
            ends = chunks.end_tensor.to(torch.int32)
            parts.append(_Part(chunks.index, chunks.token_ids, chunks.positions, chunks.kv_rows, ends))
        part = parts[0] if len(parts) == 1 else _join(*parts)
        columns = -(-longest // self._block_size)
        query_starts, sample_rows = self._query_rows(decode_count, chunks)
        return ForwardBatch(
            token_ids=part.token_ids,
            positions=part.positions,
            kv_rows=part.kv_rows,
            block_tables=self._slots.block_tables[:, :columns].index_select(0, part.index),
            slots=part.index,
            kv_lengths=part.kv_lengths,
            query_starts=query_starts,
            sample_rows=sample_rows,
            decodes=decode_count,
            query_lengths=query_lengths,
            max_kv_length=longest,
        )

    def _decode_part(self, decodes: DecodeRows, active: torch.Tensor) -> _Part:
        table = self._slots
        # A slot that idles looks again at what it has computed, and writes to the scratch block.
        lengths = table.computed.index_select(0, decodes.index).add_(active)
        positions = lengths - 1
        blocks = table.block_tables.take(decodes.table_starts + positions // self._block_size)
        rows = blocks * self._block_size + positions % self._block_size
        return _Part(
            index=decodes.index,
            token_ids=table.last_token.index_select(0, decodes.index),
            positions=positions,
            kv_rows=torch.where(active, rows, decodes.scratch),
            kv_lengths=lengths.to(torch.int32),
        )

    def _query_rows(self, decode_count: int, chunks: ChunkRows | None) -> tuple[torch.Tensor, torch.Tensor]:
        """query_starts and sample_rows."""
        if chunks is None:
            return self._arange32[: decode_count + 1], self._arange[:decode_count]
        starts = np.cumsum((decode_count, *chunks.lengths), dtype=np.int64)
        last_rows = starts[1:][chunks.completing] - 1
        chunk_starts, completing_rows = upload([starts, last_rows], self._device)
        query_starts = torch.cat((self._arange32[:decode_count], chunk_starts.to(torch.int32)))
        return query_starts, torch.cat((self._arange[:decode_count], completing_rows))


def sampling_slots(decodes: DecodeRows | None, chunks: ChunkRows | None) -> tuple[np.ndarray, torch.Tensor]:
    """The slots that sample in a step, (R,) int64 in the order of the batch: on the host and on the device."""
    if chunks is None:
        assert decodes is not None, "a step has rows"
        return decodes.slots, decodes.index
    if len(chunks.completing) == len(chunks.slots):
        slots, index = chunks.slots, chunks.index
    else:
        slots = chunks.slots[chunks.completing]
        (index,) = upload([slots], chunks.index.device)
    if decodes is None:
        return slots, index
    return np.concatenate((decodes.slots, slots)), torch.cat((decodes.index, index))


def _join(first: _Part, second: _Part) -> _Part:
    return _Part(
        index=torch.cat((first.index, second.index)),
        token_ids=torch.cat((first.token_ids, second.token_ids)),
        positions=torch.cat((first.positions, second.positions)),
        kv_rows=torch.cat((first.kv_rows, second.kv_rows)),
        kv_lengths=torch.cat((first.kv_lengths, second.kv_lengths)),
    )
