"""Gumbel noise out of a counter: the same number for a token wherever, and as often as, it is drawn.

Every number is a function of (seed, sample index, output position, vocabulary id) alone, so that neither
the shard that holds the id, nor the batch around the row, nor a replay changes it. The generator is
Philox4x32-10. Its key is the seed; its counter is (id // 4, output position, sample index, 0). One call
gives four 32-bit words, which are the noise of four consecutive ids: the word of an id is number id % 4.

Both logarithms are taken in float64 and only the result is rounded to float32. That hides the last-bit
differences between the logarithms of vector units, their scalar tails and GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LANES = 4
"""Vocabulary ids that share one call of the generator."""

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_COUNTERS_PER_BLOCK = 65536
"""Bounds the memory of the plain implementation: about ten int64 tensors of this many elements."""


@dataclass(frozen=True, slots=True)
class NoiseKeys:
    """What keys the noise of each row, beside the vocabulary id. Three int64 tensors of shape (R,)."""

    seeds: torch.Tensor
    """All 64 bits count; seeds from 2^63 on are stored as the negative number of the same bits."""
    sample_indices: torch.Tensor
    """0 to 2^32 - 1."""
    positions: torch.Tensor
    """Output position, 0 for the first output token; 0 to 2^32 - 1."""

    def block(self, rows: slice) -> NoiseKeys:
        """The keys of some of the rows."""
        return NoiseKeys(self.seeds[rows], self.sample_indices[rows], self.positions[rows])


def gumbel_noise(keys: NoiseKeys, first_id: int, columns: int) -> torch.Tensor:
    """Standard Gumbel noise of consecutive vocabulary ids.

    Args:
        keys: of R rows.
        first_id: the vocabulary id of column 0; a multiple of 4.
        columns: how many ids.

    Returns:
        (R, columns) float32 on the keys' device.

    Raises:
        ValueError: first_id is not a multiple of 4.
    """
    if first_id % LANES:
        raise ValueError(f"first_id {first_id} is not a multiple of {LANES}")
    if keys.seeds.is_cuda:
        from tpmodel_worker.kernels import gumbel_noise_triton

        return gumbel_noise_triton.gumbel_noise(keys, first_id, columns)
    return plain_gumbel_noise(keys, first_id, columns)


def gumbel_noise_at(keys: NoiseKeys, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of any vocabulary ids: equal to the columns of gumbel_noise.

    Args:
        keys: of R rows.
        ids: (R, C) int64.

    Returns:
        (R, C) float32 on the keys' device.
    """
    if keys.seeds.is_cuda:
        from tpmodel_worker.kernels import gumbel_noise_triton

        return gumbel_noise_triton.gumbel_noise_at(keys, ids)
    return plain_gumbel_noise_at(keys, ids)


def plain_gumbel_noise(keys: NoiseKeys, first_id: int, columns: int) -> torch.Tensor:
    """gumbel_noise in plain torch, on any device: what CPU ranks run and the kernel is tested against."""
    rows = keys.seeds.shape[0]
    device = keys.seeds.device
    calls = -(-columns // LANES)
    quads = torch.arange(first_id // LANES, first_id // LANES + calls, device=device).unsqueeze(0)
    noise = torch.empty(rows, calls, LANES, dtype=torch.float32, device=device)
    rows_per_block = max(1, _COUNTERS_PER_BLOCK // calls)
    for start in range(0, rows, rows_per_block):
        block = slice(start, start + rows_per_block)
        for lane, words in enumerate(_words(keys.block(block), quads)):
            noise[block, :, lane] = _gumbel(words)
    return noise.view(rows, calls * LANES)[:, :columns]


def plain_gumbel_noise_at(keys: NoiseKeys, ids: torch.Tensor) -> torch.Tensor:
    """gumbel_noise_at in plain torch, on any device."""
    noise = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    rows_per_block = max(1, _COUNTERS_PER_BLOCK // max(1, ids.shape[1]))
    for start in range(0, ids.shape[0], rows_per_block):
        block = slice(start, start + rows_per_block)
        words = torch.stack(_words(keys.block(block), ids[block] // LANES), dim=-1)
        noise[block] = _gumbel(words.gather(-1, (ids[block] % LANES).unsqueeze(-1)).squeeze(-1))
    return noise


def philox_4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox4x32 with ten rounds.

    Args:
        counter: four int64 tensors that broadcast together, each element a 32-bit word (0 to 2^32 - 1).
        key: two such tensors.

    Returns:
        Four int64 tensors of the common shape, each element a 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product of two words may pass 2^63 and come out negative. Its bits are right all the same, and
        # the mask cuts away what the arithmetic shift fills in. The low halves are masked only where they
        # are needed clean: after the last round.
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((high >> 32) ^ c1 ^ k0).bitwise_and_(_WORD)
        c2 = ((low >> 32) ^ c3 ^ k1).bitwise_and_(_WORD)
        c1, c3 = high, low
        k0 = (k0 + _KEY_STEPS[0]) & _WORD
        k1 = (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _words(keys: NoiseKeys, quads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four words of each of the quads (1 or R, C), for each row: four times (R, C)."""
    seeds = keys.seeds.unsqueeze(1)
    positions, sample_indices = keys.positions.unsqueeze(1), keys.sample_indices.unsqueeze(1)
    counter = (quads, positions, sample_indices, torch.zeros_like(positions))
    return philox_4x32(counter, (seeds & _WORD, (seeds >> 32) & _WORD))


def _gumbel(words: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float32, of 32-bit words: the middle of each word's 2^-32 wide interval of (0, 1)."""
    uniform = words.to(torch.float64).add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
