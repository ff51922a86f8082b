"""Moves one request's cache over pipes, layer by layer: out of the sender's blocks, into the receiver's own.

Beside the two caches there is never more than a few pieces on either side, in memory of the pipes. Nothing here waits
for a GPU: gathering one piece, sending another and putting a third in its place are ordered by events.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.layout import StateLayout
from tpmodel_worker.kv.plan import Part, Piece, TransferPlan
from tpmodel_worker.models.batch import LayerKvCache, LayerState

End_co = TypeVar("End_co", covariant=True)


class SendingEnd(Protocol):
    """Of a pipe."""

    def send(self, tensor: torch.Tensor | None) -> None:
        """Queues a copy. Raises KvPipeError."""
        ...

    def sending(self, shape: tuple[int, ...], dtype: torch.dtype) -> AbstractContextManager[torch.Tensor]:
        """Memory to write into, on the pipe's device; queued at the end of the block. Raises KvPipeError."""
        ...


class ReceivingEnd(Protocol):
    """Of a pipe."""

    def receive(self) -> torch.Tensor | None:
        """What the peer sent next. Raises KvPipeError."""
        ...

    def receiving(self) -> AbstractContextManager[torch.Tensor | None]:
        """The same, until the end of the block. Raises KvPipeError."""
        ...


@dataclass(frozen=True, slots=True)
class Lane(Generic[End_co]):
    """One end of a pipe, and how much is sent over it at a time."""

    end: End_co
    piece_bytes: int


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


def send_cache(plan: TransferPlan, rank: int, cache: RequestCache, lanes: Mapping[int, Lane[SendingEnd]]) -> int:
    """Sends a rank's parts; returns their bytes. On CUDA the work goes to the current stream.

    Args:
        plan: of the whole transfer.
        rank: of the source.
        cache: this rank's.
        lanes: by receiver.

    Raises:
        KvPipeError: something could not be sent.
    """
    parts = plan.of_sender(rank)
    heads, key_heads = plan.source.heads_of(rank), plan.source.key_heads_of(rank)
    rows = cache.rows()
    sent = 0
    most = {(rank, receiver): lane.piece_bytes for receiver, lane in lanes.items()}
    for part, piece in plan.turns(parts, cache.tokens, most):
        shape = _shape_of(piece, part, plan.source.head_dim)
        with lanes[part.receiver].end.sending(shape, cache.kv[0].keys.dtype) as tensor:
            _gather(cache.kv[piece.layers.start : piece.layers.stop], rows, piece, _within(part.heads, heads), tensor)
        sent += tensor.nbytes
    places = _places(plan.source.state, parts, key_heads, rows.device)
    for state in cache.states:
        for part, place in places:
            end = lanes[part.receiver].end
            sent += _send(end, place.convolution_of(state, cache.slot))
            sent += _send(end, place.recurrent_of(state, cache.slot))
    return sent


def receive_cache(plan: TransferPlan, rank: int, cache: RequestCache, lanes: Mapping[int, Lane[ReceivingEnd]]) -> int:
    """Receives a rank's parts into its blocks; returns their bytes. On CUDA the work goes to the current stream.

    Args:
        plan: of the whole transfer.
        rank: of the target.
        cache: this rank's; its blocks and slot are no other request's.
        lanes: by sender.

    Raises:
        KvPipeError: something did not come, or is not what the plan says. The blocks may hold anything then.
    """
    parts = plan.of_receiver(rank)
    heads, key_heads = plan.target.heads_of(rank), plan.target.key_heads_of(rank)
    rows = cache.rows()
    received = 0
    most = {(sender, rank): lane.piece_bytes for sender, lane in lanes.items()}
    for part, piece in plan.turns(parts, cache.tokens, most):
        layers = cache.kv[piece.layers.start : piece.layers.stop]
        with lanes[part.sender].end.receiving() as given:
            tensor = _checked(given, _shape_of(piece, part, plan.target.head_dim), layers[0].keys)
            _scatter(tensor, layers, rows, piece, _within(part.heads, heads))
        received += tensor.nbytes
    places = _places(plan.target.state, parts, key_heads, rows.device)
    for state in cache.states:
        for part, place in places:
            end = lanes[part.sender].end
            received += place.put_convolution(state, cache.slot, end)
            received += place.put_recurrent(state, cache.slot, end)
    return received


def _shape_of(piece: Piece, part: Part, head_dim: int) -> tuple[int, ...]:
    """Layers; keys, then values; tokens, heads, head_dim."""
    return (len(piece.layers), 2, piece.count, len(part.heads), head_dim)


def _within(heads: range, all_heads: range) -> slice:
    """Where heads of the whole model are among those that a rank holds."""
    return slice(heads.start - all_heads.start, heads.stop - all_heads.start)


def _send(end: SendingEnd, tensor: torch.Tensor) -> int:
    end.send(tensor)
    return tensor.nbytes


def _rows_of(part: torch.Tensor, heads: slice) -> torch.Tensor:
    """(rows of all blocks, heads, words), a view of a layer's keys or values: wide words are copied faster."""
    rows = part.flatten(0, 1)[:, heads]
    return rows.view(torch.int64) if rows.shape[-1] * rows.element_size() % 8 == 0 else rows


def _gather(
    layers: Sequence[LayerKvCache], rows: torch.Tensor, piece: Piece, heads: slice, target: torch.Tensor
) -> None:
    """Fills target, which may be on another device than the cache."""
    wanted = rows[piece.first : piece.first + piece.count]
    device = layers[0].keys.device
    near = target if target.device == device else torch.empty(target.shape, dtype=target.dtype, device=device)
    for layer, (keys, values) in zip(layers, near, strict=True):
        for part, gathered in ((layer.keys, keys), (layer.values, values)):
            held = _rows_of(part, heads)
            torch.index_select(held, 0, wanted, out=gathered.view(held.dtype))
    if near is not target:
        target.copy_(near)


def _scatter(
    tensor: torch.Tensor, layers: Sequence[LayerKvCache], rows: torch.Tensor, piece: Piece, heads: slice
) -> None:
    wanted = rows[piece.first : piece.first + piece.count]
    for layer, (keys, values) in zip(layers, tensor.to(rows.device), strict=True):
        for part, given in ((layer.keys, keys), (layer.values, values)):
            places = _rows_of(part, heads)
            places.index_copy_(0, wanted, given.view(places.dtype))


def _checked(tensor: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """Raises KvPipeError when it is not of this shape and of like's dtype."""
    if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != like.dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise KvPipeError(f"the peer sent {got}, expected {like.dtype} of shape {shape}")
    return tensor


@dataclass(frozen=True)
class _StatePlace:
    """Where some key heads are in the state of a rank that holds so many."""

    layout: StateLayout
    held: int
    heads: slice
    device: torch.device

    @property
    def value_heads(self) -> slice:
        shared = self.layout.value_heads
        return slice(self.heads.start * shared, self.heads.stop * shared)

    @functools.cached_property
    def columns(self) -> torch.Tensor:
        """(features,) int64: of the convolved ones, which are all queries, then all keys, then all values."""
        layout = self.layout
        keys, values = layout.key_dim, layout.value_heads * layout.value_dim
        columns: list[int] = []
        before = 0
        for width in (keys, keys, values):
            columns += range(before + self.heads.start * width, before + self.heads.stop * width)
            before += self.held * width
        return torch.tensor(columns, dtype=torch.int64, device=self.device)

    def convolution_of(self, state: LayerState, slot: int) -> torch.Tensor:
        """(taps, features)."""
        return state.convolution[slot].index_select(1, self.columns)

    def recurrent_of(self, state: LayerState, slot: int) -> torch.Tensor:
        """(value heads, key_dim, value_dim)."""
        return state.recurrent[slot, self.value_heads]

    def put_convolution(self, state: LayerState, slot: int, end: ReceivingEnd) -> int:
        tensor = _checked(end.receive(), (self.layout.taps, len(self.columns)), state.convolution)
        state.convolution[slot].index_copy_(1, self.columns, tensor.to(self.device))
        return tensor.nbytes

    def put_recurrent(self, state: LayerState, slot: int, end: ReceivingEnd) -> int:
        heads = self.value_heads
        shape = (heads.stop - heads.start, self.layout.key_dim, self.layout.value_dim)
        tensor = _checked(end.receive(), shape, state.recurrent)
        state.recurrent[slot, heads] = tensor.to(self.device)
        return tensor.nbytes


def _places(
    layout: StateLayout | None, parts: Sequence[Part], held: range, device: torch.device
) -> list[tuple[Part, _StatePlace]]:
    """Where each part's key heads are in the states of a rank that holds these."""
    if layout is None:
        return []
    return [
        (part, _StatePlace(layout, len(held), _within(part.key_heads, held), device))
        for part in parts
        if part.key_heads
    ]
