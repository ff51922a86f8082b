"""The convolution, and the recurrence of one token, as CUDA kernels that read and write the states in their slots.

fla-core's kernels take and return the states of a batch as tensors of their own: a decode would read and write each
state twice more than it has to, and that is most of what it moves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from tpmodel_worker.kernels.gated_delta import DeltaGates
from tpmodel_worker.kernels.launch import KernelLauncher, power_of_two, tiles
from tpmodel_worker.models.batch import LayerState

CHANNEL_TILE = 1024
VALUE_TILE = 32


def convolve_rows(
    features: torch.Tensor,
    weight: torch.Tensor,
    state: LayerState,
    slots: torch.Tensor,
    owners: torch.Tensor,
    places: torch.Tensor,
    *,
    decodes: int,
) -> torch.Tensor:
    """GatedDelta.convolve, but that only the first `decodes` rows, of one sequence each, move their state on.

    Args:
        features: (T, channels), neighbours of a row contiguous.
        weight: (channels, 1, taps + 1), contiguous.
        state: one layer's.
        slots: (B,) int64.
        owners: (T,) int64, the sequence of each row.
        places: (T,) int64, the place of each row in its sequence's part of the batch.
        decodes: as in ForwardBatch.
    """
    tokens, channels = features.shape
    output = torch.empty((tokens, channels), dtype=features.dtype, device=features.device)
    kept = state.convolution
    tile = min(CHANNEL_TILE, power_of_two(channels))
    convolve_row(
        (tokens, tiles(channels, tile)),
        *(features, weight, kept, output, slots, owners, places, features.stride(0), kept.stride(0), decodes, channels),
        constants=(kept.shape[1], tile),
    )
    return output


def keep_last_rows(
    features: torch.Tensor, state: LayerState, slots: torch.Tensor, starts: torch.Tensor, *, first: int
) -> None:
    """Moves the convolution's state of the sequences from `first` on: each keeps its last tokens' features.

    Args:
        features: (T, channels), neighbours of a row contiguous.
        state: one layer's.
        slots: (B,) int64.
        starts: (B + 1,) int32, where each sequence's rows start.
        first: of the sequences.
    """
    channels, kept = features.shape[1], state.convolution
    tile = min(CHANNEL_TILE, power_of_two(channels))
    keep_last(
        (len(slots) - first, tiles(channels, tile)),
        *(features, kept, slots, starts, features.stride(0), kept.stride(0), first, channels),
        constants=(kept.shape[1], tile),
    )


def decode_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gates: DeltaGates,
    state: LayerState,
    slots: torch.Tensor,
    output: torch.Tensor,
    *,
    rows: int,
) -> None:
    """GatedDelta.attend of the first `rows` rows, each the one token of its sequence.

    Args:
        query: (T, key_heads, key_dim), the last two dimensions contiguous.
        key: as query.
        value: (T, value_heads, value_dim), as query.
        gates: of the same tokens.
        state: one layer's.
        slots: (B,) int64.
        output: (T, value_heads, value_dim), contiguous; its first rows are written.
        rows: how many.
    """
    heads, key_dim, value_dim = state.recurrent.shape[1:]
    values = min(VALUE_TILE, power_of_two(value_dim))
    decode_head(
        (rows, heads, tiles(value_dim, values)),
        *(query, key, value, gates.step, gates.rate, gates.step_bias, gates.log_decay, state.recurrent, slots, output),
        *(key_dim**-0.5, query.stride(0), key.stride(0), value.stride(0), gates.step.stride(0), gates.rate.stride(0)),
        constants=(heads, heads // key.shape[1], key_dim, value_dim, power_of_two(key_dim), values),
    )


@KernelLauncher
@triton.jit(do_not_specialize=["decodes"])
def convolve_row(
    features,
    weight,
    kept,
    output,
    slots,
    owners,
    places,
    feature_stride,
    slot_stride,
    decodes,
    channels,
    TAPS: tl.constexpr,  # noqa: N803 (constants of the compiled kernel)
    TILE: tl.constexpr,  # noqa: N803
):
    """One token's features, a tile of channels."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = channel < channels
    owner = tl.load(owners + row)
    place = tl.load(places + row)
    old = kept + tl.load(slots + owner) * slot_stride + channel
    newest = tl.load(features + row * feature_stride + channel, mask=inside, other=0.0)
    total = newest.to(tl.float32) * tl.load(weight + channel * (TAPS + 1) + TAPS, mask=inside, other=0.0).to(tl.float32)
    decoding = row < decodes
    for tap in tl.static_range(TAPS):  # pyright: ignore[reportGeneralTypeIssues] (unrolled by the compiler)
        # Rows before the sequence's first one here are in its state.
        back = place - TAPS + tap
        within = back >= 0
        here = tl.load(features + (row - TAPS + tap) * feature_stride + channel, mask=inside & within, other=0.0)
        before = tl.load(old + (TAPS + back) * channels, mask=inside & (back < 0), other=0.0)
        feature = tl.where(within, here, before)
        total += feature.to(tl.float32) * tl.load(weight + channel * (TAPS + 1) + tap, mask=inside, other=0.0).to(
            tl.float32
        )
        if tap > 0:
            # The state moves one token on; nothing else reads it.
            tl.store(old + (tap - 1) * channels, feature, mask=inside & decoding)
    tl.store(old + (TAPS - 1) * channels, newest, mask=inside & decoding)
    result = total / (1.0 + tl.exp(-total))
    tl.store(output + row * channels + channel, result.to(output.dtype.element_ty), mask=inside)


@KernelLauncher
@triton.jit(do_not_specialize=["first"])
def keep_last(
    features,
    kept,
    slots,
    starts,
    feature_stride,
    slot_stride,
    first,
    channels,
    TAPS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """One sequence, a tile of channels."""
    sequence = tl.program_id(0) + first
    channel = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = channel < channels
    start = tl.load(starts + sequence).to(tl.int64)
    length = tl.load(starts + sequence + 1).to(tl.int64) - start
    old = kept + tl.load(slots + sequence) * slot_stride + channel
    for tap in tl.static_range(TAPS):  # pyright: ignore[reportGeneralTypeIssues]
        # What a shorter chunk leaves of the state moves towards its beginning, and so is read before it is written.
        place = length - TAPS + tap
        within = place >= 0
        here = tl.load(features + (start + place) * feature_stride + channel, mask=inside & within, other=0.0)
        before = tl.load(old + (TAPS + place) * channels, mask=inside & (place < 0), other=0.0)
        tl.store(old + tap * channels, tl.where(within, here, before), mask=inside)


@KernelLauncher
@triton.jit
def decode_head(
    query,
    key,
    value,
    step,
    rate,
    step_bias,
    log_decay,
    recurrent,
    slots,
    output,
    scale,
    query_stride,
    key_stride,
    value_stride,
    step_stride,
    rate_stride,
    HEADS: tl.constexpr,  # noqa: N803
    SHARERS: tl.constexpr,  # noqa: N803
    KEY_DIM: tl.constexpr,  # noqa: N803
    VALUE_DIM: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    VALUES: tl.constexpr,  # noqa: N803
):
    """One token of one head, a tile of its values."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    feature = tl.arange(0, KEYS)
    number = tl.program_id(2) * VALUES + tl.arange(0, VALUES)
    real, wanted = feature < KEY_DIM, number < VALUE_DIM
    both = real[:, None] & wanted[None, :]
    keys = (head // SHARERS) * KEY_DIM + feature
    place = recurrent + (tl.load(slots + row) * HEADS + head) * KEY_DIM * VALUE_DIM
    place += feature[:, None] * VALUE_DIM + number[None, :]
    memory = tl.load(place, mask=both, other=0.0)
    q = tl.load(query + row * query_stride + keys, mask=real, other=0.0).to(tl.float32)
    k = tl.load(key + row * key_stride + keys, mask=real, other=0.0).to(tl.float32)
    v = tl.load(value + row * value_stride + head * VALUE_DIM + number, mask=wanted, other=0.0).to(tl.float32)
    q *= tl.rsqrt(tl.sum(q * q) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k) + 1e-6)
    raw = tl.load(step + row * step_stride + head).to(tl.float32) + tl.load(step_bias + head)
    # softplus; from 20 on it is its argument, as in torch.
    softened = tl.where(raw > 20.0, raw, tl.log(1.0 + tl.exp(tl.minimum(raw, 20.0))))
    memory *= tl.exp(-tl.exp(tl.load(log_decay + head)) * softened)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(rate + row * rate_stride + head).to(tl.float32)))
    correction = (v - tl.sum(memory * k[:, None], 0)) * beta
    memory += k[:, None] * correction[None, :]
    result = tl.sum(memory * q[:, None], 0)
    tl.store(place, memory, mask=both)
    tl.store(output + (row * HEADS + head) * VALUE_DIM + number, result.to(output.dtype.element_ty), mask=wanted)
