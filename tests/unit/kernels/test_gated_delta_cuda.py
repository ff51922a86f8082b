"""The gated delta rule on CUDA in 16 bits, with fla-core's kernel for chunks: against plain torch in float32."""

from __future__ import annotations

import sys

import pytest
import torch

from support.gated_delta import TAPS, DeltaCase, make_batch, random
from tpmodel_worker.kernels import fla_chunks
from tpmodel_worker.kernels.gated_delta import prepare_gated_delta
from tpmodel_worker.kernels.gated_delta_torch import TorchGatedDelta
from tpmodel_worker.models.batch import LayerState

pytestmark = pytest.mark.gpu
# Each further one compiles fla-core's kernels again.
SIZES = {"published for 27 billion": (16, 48, 128, 128), "odd": (3, 6, 24, 40)}
LENGTHS = [[1] * 9, [2000], [1, 1, 130, 64, 3, 700]]


@pytest.fixture
def chunk_kernel():
    """Looked for anew in this test, and in the next one."""
    fla_chunks.chunk_kernel.cache_clear()
    yield fla_chunks.chunk_kernel
    fla_chunks.chunk_kernel.cache_clear()


@pytest.fixture
def _fla_is_there(chunk_kernel):
    assert chunk_kernel() is not None, "these tests are of fla-core's kernels: install requirements/torch.txt"


def relative(difference, expected):
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


def check(lengths, sizes, dtype):
    """Errors of outputs and states relative to float32's, and that no other slot is touched."""
    generator = torch.Generator().manual_seed(len(lengths))
    case = DeltaCase.random(generator, sum(lengths), sizes).on("cuda", dtype)
    slots = torch.randperm(12, generator=generator)[: len(lengths)].tolist()
    recurrent = random(generator, 12, *sizes[1:]).cuda()
    states = [LayerState(torch.zeros(12, TAPS, 1, device="cuda"), recurrent.clone()) for _ in range(2)]
    batch = make_batch(lengths, slots, "cuda")
    output = prepare_gated_delta(batch, TAPS).attend(*case.parts, case.gates, states[0])
    exact = case.on("cuda")
    expected = TorchGatedDelta(batch, TAPS).attend(*exact.parts, exact.gates, states[1])
    assert output.dtype == dtype
    errors = (
        relative(output.float() - expected, expected),
        relative(states[0].recurrent[slots] - states[1].recurrent[slots], states[1].recurrent[slots]),
    )
    print(f"{lengths}, {sizes}: errors {errors}")
    others = [slot for slot in range(12) if slot not in slots]
    assert torch.equal(states[0].recurrent[others], recurrent[others])
    return errors


@pytest.mark.usefixtures("_fla_is_there")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_sixteen_bits_stay_within_their_rounding(lengths, sizes):
    output, state = check(lengths, sizes, torch.bfloat16)
    assert output < 0.01
    assert state < 0.01


@pytest.mark.usefixtures("chunk_kernel")
def test_without_fla_core_plain_torch_computes_the_chunks_and_the_log_says_so_once(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    for _ in range(2):
        output, state = check([1, 130, 70], SIZES["odd"], torch.bfloat16)
        assert output < 0.01
        assert state < 0.001
    assert caplog.text.count("install fla-core") == 1


@pytest.mark.usefixtures("_fla_is_there")
@pytest.mark.parametrize("lengths", [[1] * 8, [1, 1, 130, 700]], ids=str)
def test_nothing_waits_for_the_device(lengths):
    check(lengths, SIZES["odd"], torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    case = DeltaCase.random(generator, sum(lengths), SIZES["odd"]).on("cuda", torch.bfloat16)
    channels = case.features.shape[1]
    state = LayerState(
        torch.zeros(12, TAPS, channels, device="cuda", dtype=torch.bfloat16),
        torch.zeros(12, 6, 24, 40, device="cuda"),
    )
    weight = random(generator, channels, 1, TAPS + 1).to("cuda", torch.bfloat16)
    batch = make_batch(lengths, list(range(len(lengths))), "cuda")
    prepare_gated_delta(batch, TAPS).convolve(case.features, weight, state)
    torch.cuda.set_sync_debug_mode("error")
    try:
        delta = prepare_gated_delta(batch, TAPS)
        delta.convolve(case.features, weight, state)
        delta.attend(*case.parts, case.gates, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
