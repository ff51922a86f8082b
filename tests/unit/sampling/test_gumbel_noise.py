"""Noise is a function of seed, sample, position and id, and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel_worker.kernels import gumbel_noise as noise_module
from tpmodel_worker.kernels.gumbel_noise import NoiseKeys, gumbel_noise, gumbel_noise_at, philox_4x32


def make_keys(rows: int, device: str = "cpu") -> NoiseKeys:
    generator = torch.Generator().manual_seed(rows)
    return NoiseKeys(
        seeds=torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator).to(device),
        sample_indices=torch.randint(0, 2**32, (rows,), generator=generator).to(device),
        positions=torch.randint(0, 2**20, (rows,), generator=generator).to(device),
    )


def test_noise_is_the_gumbel_of_the_word_that_seed_sample_position_and_id_key():
    seed, sample_index, position, token_id = 0xFEDCBA9876543210, 3, 17, 1234
    keys = NoiseKeys(torch.tensor([seed - 2**64]), torch.tensor([sample_index]), torch.tensor([position]))
    counter = [torch.tensor([word]) for word in (token_id // 4, position, sample_index, 0)]
    key = (torch.tensor([0x76543210]), torch.tensor([0xFEDCBA98]))
    word = int(philox_4x32((counter[0], counter[1], counter[2], counter[3]), key)[token_id % 4])
    expected = -math.log(-math.log((word + 0.5) / 2**32))
    assert float(gumbel_noise(keys, 0, 2048)[0, token_id]) == pytest.approx(expected, rel=1e-7)


@settings(max_examples=50, deadline=None)
@given(start=st.integers(0, 200), columns=st.integers(1, 300), rows=st.integers(1, 5), data=st.data())
def test_no_shard_boundary_or_batch_changes_the_noise(start: int, columns: int, rows: int, data: st.DataObject):
    keys = make_keys(5)
    whole = gumbel_noise(keys, 0, 1200)
    order = data.draw(st.permutations(range(5)))[:rows]
    part = NoiseKeys(keys.seeds[order], keys.sample_indices[order], keys.positions[order])
    assert torch.equal(gumbel_noise(part, start * 4, columns), whole[order, start * 4 : start * 4 + columns])


def test_blocks_of_rows_do_not_change_the_noise(monkeypatch: pytest.MonkeyPatch):
    keys, ids = make_keys(7), torch.arange(400).repeat(7, 1)
    whole, scattered = gumbel_noise(keys, 64, 400), gumbel_noise_at(keys, ids)
    monkeypatch.setattr(noise_module, "_COUNTERS_PER_BLOCK", 250)
    assert torch.equal(gumbel_noise(keys, 64, 400), whole)
    assert torch.equal(gumbel_noise_at(keys, ids), scattered)


def test_noise_at_ids_is_the_noise_of_their_columns():
    keys = make_keys(3)
    ids = torch.randint(0, 5000, (3, 100), generator=torch.Generator().manual_seed(0))
    assert torch.equal(gumbel_noise_at(keys, ids), gumbel_noise(keys, 0, 5000).gather(1, ids))


def test_each_part_of_the_key_changes_the_noise():
    base = NoiseKeys(torch.tensor([1]), torch.tensor([2]), torch.tensor([3]))
    others = (
        NoiseKeys(torch.tensor([1 + (1 << 32)]), base.sample_indices, base.positions),
        NoiseKeys(torch.tensor([2]), base.sample_indices, base.positions),
        NoiseKeys(base.seeds, torch.tensor([3]), base.positions),
        NoiseKeys(base.seeds, base.sample_indices, torch.tensor([4])),
    )
    noise = gumbel_noise(base, 0, 64)
    for other in others:
        assert (gumbel_noise(other, 0, 64) != noise).all()


def test_noise_has_the_mean_and_the_variance_of_a_standard_gumbel():
    noise = gumbel_noise(make_keys(4), 0, 100_000).to(torch.float64)
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_a_shard_may_not_begin_inside_a_call_of_the_generator():
    with pytest.raises(ValueError, match="first_id 6 is not a multiple of 4"):
        gumbel_noise(make_keys(1), 6, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "first_id", "columns"), [(1, 0, 64), (5, 4160, 1000), (16, 75968, 75968)])
def test_the_cuda_kernel_equals_plain_torch(rows: int, first_id: int, columns: int):
    on_device = gumbel_noise(make_keys(rows, "cuda"), first_id, columns).cpu()
    _assert_equal_but_for_roundings(on_device, gumbel_noise(make_keys(rows), first_id, columns))


@pytest.mark.gpu
def test_the_cuda_kernel_for_ids_equals_plain_torch():
    ids = torch.randint(0, 152_000, (7, 1024), generator=torch.Generator().manual_seed(0))
    on_device = gumbel_noise_at(make_keys(7, "cuda"), ids.cuda()).cpu()
    _assert_equal_but_for_roundings(on_device, gumbel_noise_at(make_keys(7), ids))


def _assert_equal_but_for_roundings(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """float64 logarithms differ in their last bits, which moves a rounding to float32 once in many millions."""
    assert (actual != expected).sum() <= 2
    torch.testing.assert_close(actual, expected, rtol=2e-7, atol=1e-9)
