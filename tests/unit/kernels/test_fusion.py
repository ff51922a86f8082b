"""What lies between the products of a layer: the CUDA kernels against plain torch, which the models' tests check."""

from __future__ import annotations

import pytest
import torch

from tpmodel_worker.kernels.fusion import (
    HeadNorms,
    add_and_normalise,
    gated_normalise,
    multiply_by_sigmoid,
    prepare_heads,
    silu_and_multiply,
)
from tpmodel_worker.models.batch import LayerKvCache

pytestmark = pytest.mark.gpu
EPS = 1e-6
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 0.02}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(function, tensors, dtype):
    """function(tensors) on the GPU in dtype against the same on the CPU, in float32 from the same rounded numbers."""
    rounded = [tensor.to(dtype) for tensor in tensors]
    outputs = function(*(tensor.cuda() for tensor in rounded))
    expected = function(*(tensor.float() for tensor in rounded))
    assert len(outputs) == len(expected)
    for output, wanted in zip(outputs, expected, strict=True):
        tolerance = DTYPES[dtype]
        torch.testing.assert_close(output.float().cpu(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("size", [64, 5120, 90])
def test_a_row_is_added_and_normalised(size, zero_centred, dtype):
    def run(hidden, update, weight):
        first = add_and_normalise(hidden, None, weight, EPS, zero_centred=zero_centred)
        return first, add_and_normalise(hidden, update, weight, EPS, zero_centred=zero_centred), hidden

    compare(run, [random(7, size), random(7, size, seed=1), random(size, seed=2)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_are_normalised_and_gated(dtype):
    def run(output, gates, weight):
        """Gates are a part of wider rows."""
        gate = gates[:, 3:63].unflatten(1, (3, 20))
        return (gated_normalise(output, gate, weight, EPS),)

    compare(run, [random(7, 3, 20), random(7, 70, seed=1), random(20, seed=2)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [40, 3000])
def test_halves_are_activated_and_multiplied(features, dtype):
    compare(lambda gate_up: (silu_and_multiply(gate_up),), [random(5, 2 * features)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_gated(dtype):
    def run(output, gates):
        return (multiply_by_sigmoid(output, gates[:, 1::2]),)

    compare(run, [random(5, 3, 24), random(5, 6, 24, seed=1)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("size", "turned"), [(32, 32), (256, 64), (48, 12)])
def test_heads_are_normalised_rotated_and_stored(size, turned, gated, dtype):
    queries, kv_heads, tokens = 6, 2, 5
    counts = (queries * (2 if gated else 1), kv_heads, kv_heads)
    rows = torch.tensor([3, 17, 4, 9, 30])

    def run(projected, query_weight, key_weight, angles):
        cosines, sines = angles.cos().to(projected.dtype), angles.sin().to(projected.dtype)
        norms = HeadNorms(query_weight, key_weight, EPS, zero_centred=gated)
        cache = LayerKvCache(
            *(torch.zeros(4, 8, kv_heads, size, dtype=projected.dtype, device=projected.device) for _ in range(2))
        )
        device_rows = rows.to(projected.device)
        heads = prepare_heads(projected, counts, norms, (cosines, sines), cache, device_rows, gated=gated)
        gate = heads.value if heads.gate is None else heads.gate
        return heads.query, heads.key, heads.value, gate, cache.keys, cache.values

    shapes = [(tokens, sum(counts), size), (size,), (size,), (tokens, 1, turned)]
    compare(run, [random(*shape, seed=seed) for seed, shape in enumerate(shapes)], dtype)
