"""Moves one request's cache over pipes, layer by layer: out of the sender's blocks, into the receiver's own.

Beside the two caches there is never more than a few pieces (plan.PIECE_BYTES) on either side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.layout import KvLayout, StateLayout
from tpmodel_worker.kv.plan import Part, Piece, TransferPlan
from tpmodel_worker.models.batch import LayerKvCache, LayerState


class SendingEnd(Protocol):
    """Of a pipe."""

    def send(self, tensor: torch.Tensor | None) -> None:
        """Queues a copy. Raises KvPipeError."""
        ...


class ReceivingEnd(Protocol):
    """Of a pipe."""

    def receive(self) -> torch.Tensor | None:
        """What the peer sent next. Raises KvPipeError."""
        ...


@dataclass(frozen=True, slots=True)
class RequestCache:
    """Where one request's cache is on one rank."""

    kv: Sequence[LayerKvCache]
    """Layers that keep keys and values, in order."""
    states: Sequence[LayerState]
    """Layers that keep a state, in order."""
    block_size: int
    blocks: Sequence[int]
    slot: int
    """Where the states are."""
    tokens: int
    """Tokens whose keys and values move; the blocks hold at least so many."""

    def rows(self) -> torch.Tensor:
        """(tokens,) int64 on the cache's device: the row of each token, over all blocks of a layer."""
        blocks = torch.tensor(self.blocks, dtype=torch.int64)
        positions = torch.arange(self.tokens)
        rows = blocks[positions // self.block_size] * self.block_size + positions % self.block_size
        return rows.to(self.kv[0].keys.device)


def send_cache(plan: TransferPlan, rank: int, cache: RequestCache, pipes: Mapping[int, SendingEnd]) -> int:
    """Sends a rank's parts; returns their bytes. On CUDA the work goes to the current stream.

    Args:
        plan: of the whole transfer.
        rank: of the source.
        cache: this rank's.
        pipes: by receiver.

    Raises:
        KvPipeError: something could not be sent.
    """
    parts = plan.of_sender(rank)
    heads, key_heads = plan.source.heads_of(rank), plan.source.key_heads_of(rank)
    rows = cache.rows()
    sent = 0
    for piece in plan.pieces(cache.tokens):
        for part in parts:
            if part.heads:
                tensor = _gather(cache.kv[piece.layer], rows, piece, _within(part.heads, heads))
                sent += _send(pipes[part.receiver], tensor)
    for state in cache.states:
        for part in parts:
            if part.key_heads and plan.source.state is not None:
                place = _StatePlace(plan.source.state, len(key_heads), _within(part.key_heads, key_heads))
                sent += _send(pipes[part.receiver], place.convolution_of(state, cache.slot))
                sent += _send(pipes[part.receiver], place.recurrent_of(state, cache.slot))
    return sent


def receive_cache(plan: TransferPlan, rank: int, cache: RequestCache, pipes: Mapping[int, ReceivingEnd]) -> int:
    """Receives a rank's parts into its blocks; returns their bytes. On CUDA the work goes to the current stream.

    Args:
        plan: of the whole transfer.
        rank: of the target.
        cache: this rank's; its blocks and slot are no other request's.
        pipes: by sender.

    Raises:
        KvPipeError: something did not come, or is not what the plan says. The blocks may hold anything then.
    """
    parts = plan.of_receiver(rank)
    heads, key_heads = plan.target.heads_of(rank), plan.target.key_heads_of(rank)
    rows = cache.rows()
    received = 0
    for piece in plan.pieces(cache.tokens):
        for part in parts:
            if part.heads:
                received += _scatter(pipes[part.sender], cache.kv[piece.layer], rows, piece, part, heads, plan.target)
    for state in cache.states:
        for part in parts:
            if part.key_heads and plan.target.state is not None:
                place = _StatePlace(plan.target.state, len(key_heads), _within(part.key_heads, key_heads))
                pipe = pipes[part.sender]
                received += place.put_convolution(state, cache.slot, pipe)
                received += place.put_recurrent(state, cache.slot, pipe)
    return received


def _within(heads: range, all_heads: range) -> slice:
    """Where heads of the whole model are among those that a rank holds."""
    return slice(heads.start - all_heads.start, heads.stop - all_heads.start)


def _send(pipe: SendingEnd, tensor: torch.Tensor) -> int:
    pipe.send(tensor)
    return tensor.numel() * tensor.element_size()


def _rows_of(part: torch.Tensor, heads: slice) -> torch.Tensor:
    """(rows of all blocks, heads, words), a view of a layer's keys or values: wide words are copied faster."""
    rows = part.flatten(0, 1)[:, heads]
    return rows.view(torch.int64) if rows.shape[-1] * rows.element_size() % 8 == 0 else rows


def _gather(layer: LayerKvCache, rows: torch.Tensor, piece: Piece, heads: slice) -> torch.Tensor:
    """(2, tokens, heads, head_dim): keys, then values."""
    wanted = rows[piece.first : piece.first + piece.count]
    keys, values = _rows_of(layer.keys, heads), _rows_of(layer.values, heads)
    gathered = torch.empty((2, piece.count, *keys.shape[1:]), dtype=keys.dtype, device=keys.device)
    for part, target in zip((keys, values), gathered, strict=True):
        torch.index_select(part, 0, wanted, out=target)
    return gathered.view(layer.keys.dtype)


def _scatter(
    pipe: ReceivingEnd, layer: LayerKvCache, rows: torch.Tensor, piece: Piece, part: Part, held: range, layout: KvLayout
) -> int:
    shape = (2, piece.count, len(part.heads), layout.head_dim)
    tensor = _receive(pipe, shape, layer.keys)
    wanted = rows[piece.first : piece.first + piece.count]
    for values, target in zip(tensor, (layer.keys, layer.values), strict=True):
        places = _rows_of(target, _within(part.heads, held))
        places.index_copy_(0, wanted, values.view(places.dtype))
    return tensor.numel() * tensor.element_size()


def _receive(pipe: ReceivingEnd, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """The next tensor, on the cache's device. Raises KvPipeError when it is not of this shape and of like's dtype."""
    tensor = pipe.receive()
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise KvPipeError(f"the peer sent {got}, expected {like.dtype} of shape {shape}")
    return tensor.to(like.device)


@dataclass(frozen=True, slots=True)
class _StatePlace:
    """Where some key heads are in the state of a rank that holds so many."""

    layout: StateLayout
    held: int
    heads: slice

    @property
    def value_heads(self) -> slice:
        shared = self.layout.value_heads
        return slice(self.heads.start * shared, self.heads.stop * shared)

    def columns(self, device: torch.device) -> torch.Tensor:
        """(features,) int64: of the convolved ones, which are all queries, then all keys, then all values."""
        layout = self.layout
        keys, values = layout.key_dim, layout.value_heads * layout.value_dim
        columns: list[int] = []
        before = 0
        for width in (keys, keys, values):
            columns += range(before + self.heads.start * width, before + self.heads.stop * width)
            before += self.held * width
        return torch.tensor(columns, dtype=torch.int64).to(device)

    def convolution_of(self, state: LayerState, slot: int) -> torch.Tensor:
        """(taps, features)."""
        return state.convolution[slot].index_select(1, self.columns(state.convolution.device))

    def recurrent_of(self, state: LayerState, slot: int) -> torch.Tensor:
        """(value heads, key_dim, value_dim)."""
        return state.recurrent[slot, self.value_heads]

    def put_convolution(self, state: LayerState, slot: int, pipe: ReceivingEnd) -> int:
        columns = self.columns(state.convolution.device)
        tensor = _receive(pipe, (self.layout.taps, len(columns)), state.convolution)
        state.convolution[slot].index_copy_(1, columns, tensor)
        return tensor.numel() * tensor.element_size()

    def put_recurrent(self, state: LayerState, slot: int, pipe: ReceivingEnd) -> int:
        heads = self.value_heads
        shape = (heads.stop - heads.start, self.layout.key_dim, self.layout.value_dim)
        tensor = _receive(pipe, shape, state.recurrent)
        state.recurrent[slot, heads] = tensor
        return tensor.numel() * tensor.element_size()
