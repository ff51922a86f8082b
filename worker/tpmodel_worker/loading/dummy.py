"""Random weights without files: a function of seed, checkpoint tensor name and element index alone.

For element i (row-major, in the whole tensor) of the tensor `name`:

    key  = first 8 bytes, little-endian, of SHA-256 of "<seed>:<name>"
    hash = splitmix64's output function of key + (i + 1) * 0x9E3779B97F4A7C15, modulo 2^64
    k    = the top 24 bits of hash, minus 2^23; so -2^23 <= k < 2^23
    a    = the power of two nearest (in the exponent) to sqrt(3 / last dimension)

Tensors of more than one dimension take k * a / 2^23: uniform in [-a, a), so that a product with normalised
inputs stays near 1. Tensors of one dimension (norms) take 1 + floor(k / 2^8) / 2^18: uniform in [0.875, 1.125). Both
are exact in float32 and then rounded to the dtype, so that every device and every sharding gives the
same bits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

CHUNK_ELEMENTS = 1 << 19
"""Elements that are computed at a time: bounds the temporary memory, and fits a CPU's cache."""

_INCREMENT = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def dummy_tensor(
    seed: int,
    name: str,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """The whole tensor of that name."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    fill_dummy(tensor, seed, name, shape)
    return tensor


def fill_dummy(
    target: torch.Tensor, seed: int, name: str, shape: Sequence[int], *, dimension: int = 0, start: int = 0
) -> None:
    """Fills target with the part of the tensor that begins at `start` of `dimension`.

    Args:
        target: need not be contiguous. Its shape is the part's.
        seed: any 64-bit number.
        name: of the checkpoint tensor.
        shape: of the whole tensor; as target's but for `dimension`.
        dimension: along which target is a part.
        start: first index of the part along it.
    """
    amplitude = None if len(shape) == 1 else _amplitude(shape[-1])
    strides = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    _fill(target, dummy_key(seed, name), start * strides[dimension], strides, amplitude)


def _fill(target: torch.Tensor, key: int, first: int, strides: Sequence[int], amplitude: float | None) -> None:
    """first: the whole tensor's index of the target's first element; strides: the whole tensor's."""
    entry_elements = math.prod(target.shape[1:])
    if target.dim() > 2 and entry_elements > CHUNK_ELEMENTS:
        for place, entry in enumerate(target):
            _fill(entry, key, first + place * strides[0], strides[1:], amplitude)
        return
    step = max(CHUNK_ELEMENTS // entry_elements, 1)
    for begin in range(0, target.shape[0], step):
        chunk = target[begin : begin + step]
        index = _offsets(chunk.shape, strides, target.device).add_(first + begin * strides[0])
        bits = _hash(index, key)
        chunk.copy_(_norm_values(bits) if amplitude is None else _matrix_values(bits, amplitude))


def _offsets(shape: Sequence[int], strides: Sequence[int], device: torch.device) -> torch.Tensor:
    """The sum over the dimensions of index times stride, for every element of the shape: int64."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for size, stride in zip(shape, strides, strict=True):
        total = total.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device=device) * stride
    return total


def dummy_key(seed: int, name: str) -> int:
    """What tells a tensor's hashes from another's: 64 bits, unsigned."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")


def _amplitude(fan_in: int) -> float:
    return 2.0 ** round(math.log2(math.sqrt(3 / fan_in)))


def _matrix_values(bits: torch.Tensor, amplitude: float) -> torch.Tensor:
    return bits.float().mul_(amplitude / 2**23)


def _norm_values(bits: torch.Tensor) -> torch.Tensor:
    return (bits >> 8).float().mul_(2.0**-18).add_(1.0)


def _hash(index: torch.Tensor, key: int) -> torch.Tensor:
    """The top 24 bits of the hash of each index, minus 2^23. index is overwritten.

    int64 arithmetic wraps around, which is arithmetic modulo 2^64.
    """
    state = index.add_(1).mul_(_signed(_INCREMENT)).add_(_signed(key))
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        state.bitwise_xor_(_shift_right(state, shift)).mul_(_signed(multiplier))
    # The function's last step leaves the top 31 bits as they are: it can be left out.
    return _shift_right(state, 40).sub_(1 << 23)


def _shift_right(state: torch.Tensor, shift: int) -> torch.Tensor:
    """Shifts zeros in, where torch repeats the sign."""
    return (state >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
