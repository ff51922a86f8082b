"""Paged attention on CUDA: one kernel for decodes and prefill chunks.

A program computes a tile of one sequence's queries for one KV head. The query heads that share the KV head
stand as rows of the same tile, so that every key and value is read once for all of them. Keys are found
through the block table, tile by tile, with a running maximum and sum (online softmax) in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpmodel_worker.kernels.attention import PagedAttention
from tpmodel_worker.kernels.launch import KernelLauncher, power_of_two
from tpmodel_worker.models.batch import ForwardBatch, LayerKvCache

DECODE_ROWS = 16
"""Rows of a tile for one query token: the least that the matrix units take."""
PREFILL_ROWS = 64
KEY_TILE = 64


class TritonPagedAttention(PagedAttention):
    """Two launches at most: one for the decodes, one for the prefill chunks. Never waits for the device."""

    def __init__(self, batch: ForwardBatch) -> None:
        super().__init__(batch)
        self._batch = batch

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cache: LayerKvCache, scale: float
    ) -> torch.Tensor:
        """See PagedAttention.attend. Keys and values are read from the cache alone."""
        batch = self._batch
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if batch.decodes:
            _launch(query, cache, batch, scale, output, first=0, programs=batch.decodes, rows=DECODE_ROWS, decode=True)
        chunks = batch.query_lengths[batch.decodes :]
        if chunks:
            tile = _queries_per_tile(PREFILL_ROWS, query, cache)
            # One more for each chunk than its whole tiles; those that nothing is left for end at once.
            programs = sum(chunks) // tile + len(chunks)
            _launch(
                query,
                cache,
                batch,
                scale,
                output,
                first=batch.decodes,
                programs=programs,
                rows=PREFILL_ROWS,
                decode=False,
            )
        return output


def _group(query: torch.Tensor, cache: LayerKvCache) -> int:
    """Query heads of a KV head."""
    return query.shape[1] // cache.keys.shape[2]


def _rows(rows: int, query: torch.Tensor, cache: LayerKvCache) -> int:
    return max(rows, power_of_two(_group(query, cache)))


def _queries_per_tile(rows: int, query: torch.Tensor, cache: LayerKvCache) -> int:
    return _rows(rows, query, cache) // _group(query, cache)


def _launch(
    query: torch.Tensor,
    cache: LayerKvCache,
    batch: ForwardBatch,
    scale: float,
    output: torch.Tensor,
    *,
    first: int,
    programs: int,
    rows: int,
    decode: bool,
) -> None:
    if query.stride(2) != 1 or cache.keys.stride() != cache.values.stride() or cache.keys.stride(3) != 1:
        raise ValueError("heads have to be contiguous, and keys to lie as values do")
    kv_heads, head_dim = cache.keys.shape[2:]
    # Half as many keys where an element is twice as large.
    keys_of_tile = KEY_TILE if query.element_size() == 2 else KEY_TILE // 2
    group, rows_of_tile = _group(query, cache), _rows(rows, query, cache)
    attend_tile(
        (programs, kv_heads),
        *(query, cache.keys, cache.values, output, batch.block_tables, batch.kv_lengths, batch.query_starts),
        scale * 1.4426950408889634,  # scores in powers of two: exp2 is the cheaper one
        *(first, len(batch.query_lengths), *query.stride()[:2], *output.stride()[:2], batch.block_tables.stride(0)),
        *cache.keys.stride()[:3],
        constants=(
            *(cache.keys.shape[1], head_dim, max(16, power_of_two(head_dim)), group, rows_of_tile, keys_of_tile),
            decode,
        ),
    )


# Numbers that change from step to step must not make new kernels: while one is compiled, every stream waits. The block
# table of a step is as wide as its longest sequence, so its stride is such a number.
@KernelLauncher
@triton.jit(do_not_specialize=["first_sequence", "sequences", "table_stride"])
def attend_tile(
    query,
    keys,
    values,
    output,
    block_tables,
    kv_lengths,
    query_starts,
    scale,
    first_sequence,
    sequences,
    query_token_stride,
    query_head_stride,
    output_token_stride,
    output_head_stride,
    table_stride,
    block_stride,
    slot_stride,
    kv_head_stride,
    BLOCK_SIZE: tl.constexpr,  # noqa: N803 (constants of the compiled kernel)
    HEAD_DIM: tl.constexpr,  # noqa: N803
    PADDED_HEAD_DIM: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    DECODE: tl.constexpr,  # noqa: N803
):
    """One tile of queries (program 0) of one KV head (program 1).

    Row r of a tile is query r // GROUP of the tile, head r % GROUP of the KV head's group.
    """
    TILE: tl.constexpr = ROWS // GROUP  # noqa: N806 (queries of a tile)
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    if DECODE:
        sequence = first_sequence + program
        tile = 0
    else:
        # Tiles of sequence s are counted from (tokens of the chunks before it) // TILE + (chunks before it).
        # The sequence of a tile is the last one whose count is not above it.
        base = tl.load(query_starts + first_sequence)
        sequence = first_sequence
        beyond = sequences
        while beyond - sequence > 1:
            middle = (sequence + beyond) // 2
            count = (tl.load(query_starts + middle) - base) // TILE + middle - first_sequence
            if count <= program:
                sequence = middle
            else:
                beyond = middle
        tile = program - (tl.load(query_starts + sequence) - base) // TILE - (sequence - first_sequence)

    start = tl.load(query_starts + sequence)
    length = tl.load(query_starts + sequence + 1) - start
    if tile * TILE >= length:
        return
    kv_length = tl.load(kv_lengths + sequence)

    rows = tl.arange(0, ROWS)
    queries = tile * TILE + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    is_row = (rows < TILE * GROUP) & (queries < length)
    dimensions = tl.arange(0, PADDED_HEAD_DIM)
    is_dimension = dimensions < HEAD_DIM
    q = tl.load(
        query
        + (start + queries)[:, None].to(tl.int64) * query_token_stride
        + heads[:, None] * query_head_stride
        + dimensions[None, :],
        mask=is_row[:, None] & is_dimension[None, :],
        other=0.0,
    )
    positions = kv_length - length + queries

    maximum = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    attended = tl.zeros([ROWS, PADDED_HEAD_DIM], dtype=tl.float32)
    last_query = tl.minimum(tile * TILE + TILE, length)
    for first_key in range(0, kv_length - length + last_query, KEYS):
        places = first_key + tl.arange(0, KEYS)
        is_key = places < kv_length
        blocks = tl.load(block_tables + sequence * table_stride + places // BLOCK_SIZE, mask=is_key, other=0)
        offsets = (
            blocks.to(tl.int64)[:, None] * block_stride
            + (places % BLOCK_SIZE)[:, None] * slot_stride
            + kv_head * kv_head_stride
            + dimensions[None, :]
        )
        loaded = is_key[:, None] & is_dimension[None, :]
        k = tl.load(keys + offsets, mask=loaded, other=0.0)
        v = tl.load(values + offsets, mask=loaded, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(places[None, :] <= positions[:, None], scores, float("-inf"))
        # Every row sees key 0, so that the maximum is finite from the first tile on.
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weights, 1)
        attended = attended * correction[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        maximum = new_maximum

    # A finished sequence may have no keys at all.
    attended = attended / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        output
        + (start + queries)[:, None].to(tl.int64) * output_token_stride
        + heads[:, None] * output_head_stride
        + dimensions[None, :],
        attended.to(output.dtype.element_ty),
        mask=is_row[:, None] & is_dimension[None, :],
    )
