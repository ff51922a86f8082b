"""Paged attention in plain torch: what runs on the CPU, and what the CUDA kernel is compared with.

Sequences of similar length share one gather and one product, padded to the longest of them; there
are never more groups than powers of two between the shortest and the longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)

from tpmodel_worker.kernels.attention import PagedAttention
from tpmodel_worker.models.batch import ForwardBatch, LayerKvCache

SMALL_DECODE = 4096
"""Decodes with fewer keys than this, padding included, stay in one group: a second one would cost more."""


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one query token each."""

    rows: torch.Tensor | None
    """(B,) rows of T; None: the first B."""
    count: int
    blocks: torch.Tensor
    """(B * blocks of the longest,), the sequences' blocks."""
    mask: torch.Tensor
    """(B, 1, 1, keys), 0 for keys that a sequence has, -inf past its end."""


@dataclass(frozen=True, slots=True)
class PrefillGroup:
    """Chunks of several query tokens each."""

    rows: torch.Tensor
    """(chunks * longest,) rows of T, each chunk's last one repeated up to the longest."""
    chunks: int
    real: torch.Tensor | None
    """Which entries of rows are no repetition; None: all."""
    blocks: torch.Tensor | None
    """(chunks * blocks of the longest,); None: the chunks start their sequences, this step holds all keys."""
    mask: torch.Tensor | None
    """(chunks, 1, longest, keys), 0 up to a query's own position, -inf after; None where blocks is."""


class TorchPagedAttention(PagedAttention):
    """One padded product for each group of sequences of similar length."""

    def __init__(self, batch: ForwardBatch, cache: LayerKvCache) -> None:
        """Reads the batch's lengths on the host."""
        super().__init__(batch)
        self._batch = batch
        self._block_size = cache.keys.shape[1]
        self._dtype = cache.keys.dtype
        lengths: list[int] = batch.kv_lengths.tolist()
        self._decodes = [self._decode_group(group, lengths) for group in _decode_groups(lengths[: batch.decodes])]
        self._prefills = [
            self._prefill_group(group, lengths)
            for group in _prefill_groups(batch.decodes, batch.query_lengths, lengths)
        ]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerKvCache, scale: float
    ) -> torch.Tensor:
        """See PagedAttention.attend."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in self._decodes:
            _attend_decodes(group, query, cache, scale, output)
        for group in self._prefills:
            _attend_chunks(group, query, key, value, cache, scale, output)
        return output

    def _decode_group(self, members: Sequence[int], lengths: Sequence[int]) -> DecodeGroup:
        batch = self._batch
        keys = self._rounded(max(lengths[member] for member in members))
        whole = len(members) == batch.decodes
        index = torch.arange(batch.decodes) if whole else torch.tensor(members)
        index = index.to(batch.kv_lengths.device)
        # A sequence that finished may have no keys: it attends to one, so that nothing becomes nan.
        seen = batch.kv_lengths[index].clamp_min(1)
        mask = self._additive(torch.arange(keys, device=index.device) < seen.unsqueeze(1))
        return DecodeGroup(None if whole else index, len(members), self._blocks(index, keys), mask[:, None, None])

    def _prefill_group(self, members: Sequence[int], lengths: Sequence[int]) -> PrefillGroup:
        batch = self._batch
        index = torch.tensor(members, device=batch.kv_lengths.device)
        counts = batch.query_starts[index + 1] - batch.query_starts[index]
        longest = max(batch.query_lengths[member] for member in members)
        steps = torch.arange(longest, device=index.device)
        padded = torch.minimum(steps, counts.unsqueeze(1) - 1)
        rows = (batch.query_starts[index].unsqueeze(1) + padded).long()
        ragged = any(batch.query_lengths[member] != longest for member in members)
        real = (steps < counts.unsqueeze(1)).flatten() if ragged else None
        if all(lengths[member] == batch.query_lengths[member] for member in members):
            return PrefillGroup(rows.flatten(), len(members), real, None, None)
        keys = self._rounded(max(lengths[member] for member in members))
        visible = torch.arange(keys, device=index.device) <= batch.positions[rows].unsqueeze(-1)
        mask = self._additive(visible).unsqueeze(1)
        return PrefillGroup(rows.flatten(), len(members), real, self._blocks(index, keys), mask)

    def _rounded(self, keys: int) -> int:
        """The keys of whole blocks."""
        return -(-max(keys, 1) // self._block_size) * self._block_size

    def _blocks(self, index: torch.Tensor, keys: int) -> torch.Tensor:
        return self._batch.block_tables[index, : keys // self._block_size].flatten()

    def _additive(self, visible: torch.Tensor) -> torch.Tensor:
        return torch.zeros(visible.shape, dtype=self._dtype, device=visible.device).masked_fill_(
            ~visible, float("-inf")
        )


def _attend_decodes(
    group: DecodeGroup, query: torch.Tensor, cache: LayerKvCache, scale: float, output: torch.Tensor
) -> None:
    keys, values = _gather(cache, group.blocks, group.count)
    queries = query[: group.count] if group.rows is None else query[group.rows]
    # The query heads of a KV head stand where a sequence's queries would: keys and values need no copies.
    attended = F.scaled_dot_product_attention(
        queries.unflatten(1, (keys.shape[1], -1)), keys, values, attn_mask=group.mask, scale=scale
    ).flatten(1, 2)
    if group.rows is None:
        output[: group.count] = attended
    else:
        output[group.rows] = attended


def _attend_chunks(
    group: PrefillGroup,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: LayerKvCache,
    scale: float,
    output: torch.Tensor,
) -> None:
    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[group.rows].unflatten(0, (group.chunks, -1)).transpose(1, 2)

    # Repetitions stand after a chunk's last token, where causality hides them from its queries.
    keys, values = (padded(key), padded(value)) if group.blocks is None else _gather(cache, group.blocks, group.chunks)
    attended = F.scaled_dot_product_attention(
        padded(query),
        keys,
        values,
        attn_mask=group.mask,
        is_causal=group.blocks is None,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    attended = attended.transpose(1, 2).flatten(0, 1)
    if group.real is None:
        output[group.rows] = attended
    else:
        output[group.rows[group.real]] = attended[group.real]


def _gather(cache: LayerKvCache, blocks: torch.Tensor, sequences: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of whole blocks: (sequences, kv_heads, keys, head_dim) each."""
    keys, values = (
        tensor.index_select(0, blocks).flatten(0, 1).unflatten(0, (sequences, -1)).transpose(1, 2)
        for tensor in (cache.keys, cache.values)
    )
    return keys, values


def _decode_groups(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of sequences in groups of lengths within a factor of two of each other."""
    if not lengths:
        return []
    if len(lengths) * max(lengths) <= SMALL_DECODE:
        return [list(range(len(lengths)))]
    groups: defaultdict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        groups[length.bit_length()].append(index)
    return list(groups.values())


def _prefill_groups(decodes: int, query_lengths: Sequence[int], kv_lengths: Sequence[int]) -> list[list[int]]:
    """As _decode_groups, by query and key length; chunks that start a sequence are apart from others."""
    groups: defaultdict[tuple[int, int, bool], list[int]] = defaultdict(list)
    for index in range(decodes, len(query_lengths)):
        queries, keys = query_lengths[index], kv_lengths[index]
        groups[queries.bit_length(), keys.bit_length(), queries == keys].append(index)
    return list(groups.values())
