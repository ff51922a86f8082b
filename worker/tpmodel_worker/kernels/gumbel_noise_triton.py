"""Gumbel noise on CUDA: kernels.gumbel_noise in Triton. Import it only where a GPU is used."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpmodel_worker.kernels.gumbel_noise import LANES, NoiseKeys

_BLOCK = tl.constexpr(256)
"""Calls of the generator in one program."""


def gumbel_noise(keys: NoiseKeys, first_id: int, columns: int) -> torch.Tensor:
    """(R, columns) float32: the noise of ids first_id on; first_id is a multiple of 4."""
    rows = keys.seeds.shape[0]
    noise = torch.empty(rows, columns, dtype=torch.float32, device=keys.seeds.device)
    if noise.numel():
        grid = (rows, triton.cdiv(columns, _BLOCK.value * LANES))
        _dense_kernel[grid](noise, keys.seeds, keys.sample_indices, keys.positions, first_id // LANES, columns)
    return noise


def gumbel_noise_at(keys: NoiseKeys, ids: torch.Tensor) -> torch.Tensor:
    """(R, C) float32: the noise of ids (R, C) int64."""
    rows, columns = ids.shape
    noise = torch.empty(rows, columns, dtype=torch.float32, device=ids.device)
    if noise.numel():
        grid = (rows, triton.cdiv(columns, _BLOCK.value))
        _scattered_kernel[grid](noise, ids.contiguous(), keys.seeds, keys.sample_indices, keys.positions, columns)
    return noise


# Outside a kernel a jitted function only raises, so type checkers take what it returns for NoReturn: hence the
# two ignores below.
@triton.jit
def _words(seeds, sample_indices, positions, row, quads):
    """The four Philox words of each quad of ids, for one row."""
    seed = tl.load(seeds + row).to(tl.uint64)
    position = tl.load(positions + row).to(tl.uint32)
    sample_index = tl.load(sample_indices + row).to(tl.uint32)
    c0 = quads.to(tl.uint32)
    zeros = tl.zeros_like(c0)
    return tl.philox(seed, c0, zeros + position, zeros + sample_index, zeros)


@triton.jit
def _gumbel(words):
    uniform = (words.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2^-32
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def _dense_kernel(noise, seeds, sample_indices, positions, first_quad, columns):
    """One program: one row, _BLOCK quads of ids."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * _BLOCK
    quads = first_quad + start + tl.arange(0, _BLOCK)
    w0, w1, w2, w3 = _words(seeds, sample_indices, positions, row, quads)  # pyright: ignore[reportGeneralTypeIssues]
    # Interleaved twice, the words of a quad stand side by side, as their ids do.
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    column = start * 4 + tl.arange(0, _BLOCK * 4)
    tl.store(noise + row * columns + column, _gumbel(words), mask=column < columns)


@triton.jit
def _scattered_kernel(noise, ids, seeds, sample_indices, positions, columns):
    """One program: one row, _BLOCK columns of any ids."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    wanted = column < columns
    token_ids = tl.load(ids + row * columns + column, mask=wanted, other=0)
    quads = token_ids // 4
    w0, w1, w2, w3 = _words(seeds, sample_indices, positions, row, quads)  # pyright: ignore[reportGeneralTypeIssues]
    lane = token_ids % 4
    words = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    tl.store(noise + row * columns + column, _gumbel(words), mask=wanted)
