"""Paged attention: torch against a plain formula, the CUDA kernel against torch."""

import dataclasses
import math
import random
import subprocess
import sys
from typing import Any

import pytest
import torch

from tpmodel_worker.kernels.attention import prepare_attention
from tpmodel_worker.kernels.attention_torch import TorchPagedAttention
from tpmodel_worker.kernels.kv_cache import write_kv
from tpmodel_worker.models.batch import ForwardBatch, LayerKvCache


@dataclasses.dataclass
class Case:
    """Random queries, keys and values of sequences whose earlier tokens are in the cache already."""

    batch: ForwardBatch
    cache: LayerKvCache
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    histories: list[tuple[torch.Tensor, torch.Tensor]]
    """All keys and values of each sequence, (tokens, kv_heads, head_dim)."""


def make_case(
    lengths, *, heads=8, kv_heads=2, head_dim=16, block_size=8, dtype=torch.float32, device="cpu", seed=0
) -> Case:
    """lengths: (query tokens, key tokens) of each sequence; those with one query first."""
    assert all(queries > 1 for queries, _ in lengths[sum(queries == 1 for queries, _ in lengths) :])
    generator = torch.Generator().manual_seed(seed)
    longest = max(-(-keys // block_size) for _, keys in lengths)
    blocks = list(range(longest * len(lengths)))
    random.Random(seed).shuffle(blocks)
    tables = torch.tensor(blocks, dtype=torch.int32).view(len(lengths), longest)
    shape = (len(blocks) + 1, block_size, kv_heads, head_dim)
    cache = LayerKvCache(torch.full(shape, 100.0, dtype=dtype), torch.full(shape, 100.0, dtype=dtype))
    positions, rows, histories = [], [], []
    for (queries, keys), table in zip(lengths, tables, strict=True):
        places = torch.arange(keys)
        slots = table[places // block_size].long() * block_size + places % block_size
        history = tuple(torch.randn(keys, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2))
        write_kv(history[0][:-queries], history[1][:-queries], cache, slots[:-queries])
        positions.append(places[-queries:])
        rows.append(slots[-queries:])
        histories.append(history)
    counts = [queries for queries, _ in lengths]
    total = sum(counts)
    batch = ForwardBatch(
        token_ids=torch.zeros(total, dtype=torch.int64),
        positions=torch.cat(positions),
        kv_rows=torch.cat(rows),
        block_tables=tables,
        slots=torch.arange(len(lengths)),
        kv_lengths=torch.tensor([keys for _, keys in lengths], dtype=torch.int32),
        query_starts=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        sample_rows=torch.arange(total),
        decodes=counts.count(1),
        query_lengths=tuple(counts),
        max_kv_length=max(keys for _, keys in lengths),
    )
    query = torch.randn(total, heads, head_dim, generator=generator).to(dtype)
    key, value = (
        torch.cat([history[part][-queries:] for history, queries in zip(histories, counts, strict=True)])
        for part in (0, 1)
    )
    case = Case(batch, cache, query, key, value, histories)
    return move(case, device) if device != "cpu" else case


def move(case: Case, device: str) -> Case:
    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        if isinstance(value, tuple | list):
            return type(value)(moved(item) for item in value)
        return value

    def replaced(record: Any) -> Any:
        return type(record)(**{f.name: moved(getattr(record, f.name)) for f in dataclasses.fields(record)})

    return Case(replaced(case.batch), replaced(case.cache), *(moved(item) for item in dataclasses.astuple(case)[2:]))


def expected(case: Case, scale: float) -> torch.Tensor:
    """The textbook formula in float64, one sequence and one head at a time."""
    output = torch.zeros(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.cache.keys.shape[2]
    start = 0
    for (keys, values), queries in zip(case.histories, case.batch.query_lengths, strict=True):
        for row in range(queries):
            seen = keys.shape[0] - queries + row + 1
            for head in range(case.query.shape[1]):
                scores = keys[:seen, head // group].double() @ case.query[start + row, head].double() * scale
                output[start + row, head] = scores.softmax(0) @ values[:seen, head // group].double()
        start += queries
    return output


def attend(case: Case, implementation, scale: float) -> torch.Tensor:
    write_kv(case.key, case.value, case.cache, implementation.kv_rows)
    return implementation.attend(case.query, case.key, case.value, case.cache, scale)


LENGTHS = {
    "one_decode": [(1, 5)],
    "first_token": [(1, 1)],
    "decodes_of_unlike_lengths": [(1, 3), (1, 40), (1, 8), (1, 17)],
    "decodes_in_several_groups": [(1, 3), (1, 2200), (1, 900), (1, 17)],
    "one_prompt": [(20, 20)],
    "prompts_of_unlike_lengths": [(20, 20), (17, 17), (31, 31), (2, 2), (5, 5)],
    "chunks_with_history": [(4, 20), (7, 19), (5, 70), (6, 7)],
    "everything": [(1, 9), (1, 30), (20, 20), (4, 20), (3, 64), (33, 33)],
}


@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (6, 2), (5, 1)])
@pytest.mark.parametrize("name", LENGTHS)
def test_torch_attention_equals_the_formula(name, heads):
    case = make_case(LENGTHS[name], heads=heads[0], kv_heads=heads[1])
    output = attend(case, prepare_attention(case.batch, case.cache), 0.3)
    torch.testing.assert_close(output.double(), expected(case, 0.3), atol=2e-5, rtol=1e-5)


def test_attention_does_not_read_past_a_sequence_or_its_own_position():
    """What other blocks and later rows hold, even nan, is not seen through a weight of zero."""
    case = make_case([(1, 5), (6, 14)])
    written = torch.zeros(case.cache.keys.shape[:2], dtype=torch.bool)
    for table, length in zip(case.batch.block_tables, case.batch.kv_lengths.tolist(), strict=True):
        for position in range(length):
            written[int(table[position // 8]), position % 8] = True
    for tensor in (case.cache.keys, case.cache.values):
        tensor[~written] = 1e30
    output = attend(case, prepare_attention(case.batch, case.cache), 0.3)
    torch.testing.assert_close(output.double(), expected(case, 0.3), atol=2e-5, rtol=1e-5)


def test_a_finished_sequence_without_keys_disturbs_nobody():
    case = make_case([(1, 9), (1, 4)])
    case.batch.kv_lengths[0] = 0
    output = attend(case, prepare_attention(case.batch, case.cache), 0.3)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output[1].double(), expected(case, 0.3)[1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_its_rounding(dtype):
    case = make_case(LENGTHS["everything"], dtype=dtype)
    output = attend(case, prepare_attention(case.batch, case.cache), 0.3)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected(case, 0.3), atol=0.03, rtol=0.03)


def test_write_kv_takes_views_and_repeated_scratch_rows():
    """Finished sequences all write to the last block."""
    keys = torch.zeros(3, 4, 2, 8)
    cache = LayerKvCache(keys, torch.zeros_like(keys))
    projected = torch.randn(4, 6, 8)
    write_kv(projected[:, 2:4], projected[:, 4:], cache, torch.tensor([5, 8, 8, 0]))
    assert torch.equal(cache.keys.flatten(0, 1)[5], projected[0, 2:4])
    assert torch.equal(cache.values.flatten(0, 1)[0], projected[3, 4:])
    assert not cache.keys[1, 2:].any()


def test_the_cpu_needs_no_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None; "
        "import tpmodel_worker.models.registry, tpmodel_worker.kernels.attention_torch"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


CUDA_SHAPES = [
    {"heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 16},
    {"heads": 5, "kv_heads": 1, "head_dim": 48, "block_size": 8},
    {"heads": 4, "kv_heads": 4, "head_dim": 64, "block_size": 32},
    {"heads": 24, "kv_heads": 1, "head_dim": 16, "block_size": 16},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", CUDA_SHAPES, ids=str)
@pytest.mark.parametrize("name", [*LENGTHS, "long"])
def test_the_cuda_kernel_equals_torch(name, shape, dtype):
    lengths = LENGTHS.get(name, [(1, 3000), (1, 700), (300, 1200), (513, 513), (64, 100)])
    case = make_case(lengths, dtype=dtype, **shape)
    scale = 1 / math.sqrt(shape["head_dim"])
    exact = Case(
        case.batch,
        LayerKvCache(case.cache.keys.float(), case.cache.values.float()),
        case.query.float(),
        case.key.float(),
        case.value.float(),
        [],
    )
    reference = attend(exact, TorchPagedAttention(exact.batch, exact.cache), scale)
    on_device = move(case, "cuda")
    implementation = prepare_attention(on_device.batch, on_device.cache)
    assert type(implementation).__name__ == "TritonPagedAttention"
    output = attend(on_device, implementation, scale).cpu()
    tolerance = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output.float(), reference, atol=tolerance, rtol=tolerance)


@pytest.mark.gpu
def test_the_cuda_kernel_takes_sequences_without_keys():
    case = make_case([(1, 9), (1, 4)], device="cuda")
    case.batch.kv_lengths[0] = 0
    assert torch.isfinite(attend(case, prepare_attention(case.batch, case.cache), 0.3)).all()
