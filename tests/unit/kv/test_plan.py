"""Which rank sends what to which rank, and that it arrives in the right place: every layer, head, token and state."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import zlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel_worker.kv.errors import KvMismatchError, KvPipeError
from tpmodel_worker.kv.layout import KvLayout, StateLayout
from tpmodel_worker.kv.plan import Part, TransferPlan, plan_transfer
from tpmodel_worker.kv.transfer import Lane, RequestCache, receive_cache, send_cache
from tpmodel_worker.models.batch import LayerKvCache, LayerState
from tpmodel_worker.models.sharding import HeadShard

STATE = StateLayout(layers=2, key_heads=4, value_heads=2, key_dim=3, value_dim=5, taps=3)
SLOTS = 3
RANKS = (1, 2, 4, 8)


def layout(ranks: int = 1, **changes: Any) -> KvLayout:
    values: dict[str, Any] = {
        "model_id": "test/model",
        "config_digest": "ab12",
        "dtype": "float32",
        "layers": 3,
        "kv_heads": 4,
        "head_dim": 2,
        "block_size": 4,
        "ranks": ranks,
    }
    return KvLayout(**(values | changes))


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("ranks", RANKS)
def test_a_rank_holds_the_heads_that_the_model_gives_it(kv_heads: int, ranks: int) -> None:
    for rank in range(ranks):
        shard = HeadShard.of_rank(8, kv_heads, rank, ranks)
        expected = range(shard.kv_start, shard.kv_start + shard.kv_heads)
        assert layout(ranks, kv_heads=kv_heads).heads_of(rank) == expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("senders", RANKS)
@pytest.mark.parametrize("receivers", RANKS)
def test_every_rank_gets_every_head_that_it_needs_exactly_once(kv_heads: int, senders: int, receivers: int) -> None:
    """Also where heads are replicated, on either side; from a rank that holds them."""
    source, target = layout(senders, kv_heads=kv_heads), layout(receivers, kv_heads=kv_heads)
    plan = plan_transfer(source, target)
    for receiver in range(receivers):
        parts = plan.of_receiver(receiver)
        assert sorted(head for part in parts for head in part.heads) == list(target.heads_of(receiver))
        for part in parts:
            assert set(part.heads) <= set(source.heads_of(part.sender))
    assert sorted(part.receiver for sender in range(senders) for part in plan.of_sender(sender)) == sorted(
        part.receiver for part in plan.parts
    )


def test_replicas_of_a_head_share_the_work() -> None:
    plan = plan_transfer(layout(4, kv_heads=1), layout(2, kv_heads=1))
    assert [(part.sender, part.receiver) for part in plan.parts] == [(0, 0), (2, 1)]
    plan = plan_transfer(layout(2, kv_heads=1), layout(4, kv_heads=1))
    assert [(part.sender, part.receiver) for part in plan.parts] == [(0, 0), (0, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_id", "test/other"),
        ("config_digest", "cd34"),
        ("dtype", "bfloat16"),
        ("layers", 5),
        ("kv_heads", 8),
        ("head_dim", 16),
        ("state", STATE),
    ],
)
def test_gangs_that_differ_are_refused_naming_both_values(field: str, value: Any) -> None:
    source = layout()
    with pytest.raises(KvMismatchError) as caught:
        plan_transfer(source, dataclasses.replace(source, **{field: value}))
    message = str(caught.value)
    assert message.startswith(f"{field}: ")
    assert repr(getattr(source, field)) in message
    assert repr(value) in message


def test_a_layout_survives_the_wire() -> None:
    for original in (layout(2), layout(4, state=STATE)):
        assert KvLayout.from_message(original.to_message()) == original


def test_a_layout_of_nothing_is_refused() -> None:
    message = layout().to_message()
    message.kv_heads = 0
    with pytest.raises(KvMismatchError, match="kv_heads of the other gang is 0"):
        KvLayout.from_message(message)


class Pipe:
    """What is sent is received, in order."""

    def __init__(self) -> None:
        self.items: deque[torch.Tensor] = deque()
        self.bytes = 0

    def send(self, tensor: torch.Tensor | None) -> None:
        assert tensor is not None
        assert tensor.numel()
        self.items.append(tensor.clone())
        self.bytes += tensor.nbytes

    @contextlib.contextmanager
    def sending(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        tensor = torch.full(shape, -2, dtype=dtype)
        yield tensor
        self.send(tensor)
        tensor.fill_(-2)

    def receive(self) -> torch.Tensor | None:
        return self.items.popleft() if self.items else None

    @contextlib.contextmanager
    def receiving(self) -> Iterator[torch.Tensor | None]:
        tensor = self.receive()
        yield tensor
        if tensor is not None:
            tensor.fill_(-2)


class Gang:
    """The caches of all ranks. Each number of a whole model's cache says where it belongs."""

    def __init__(self, shape: KvLayout, tokens: int, seed: int, *, filled: bool) -> None:
        self.shape = shape
        shuffled = random.Random(seed)
        count = -(-tokens // shape.block_size)
        total = count + 3
        self.blocks = shuffled.sample(range(total), count)
        self.slot = shuffled.randrange(SLOTS)
        self.caches = [self._empty(rank, total, tokens) for rank in range(shape.ranks)]
        if filled:
            for rank, cache in enumerate(self.caches):
                self._fill(rank, cache)

    def _empty(self, rank: int, total: int, tokens: int) -> RequestCache:
        shape, state = self.shape, self.shape.state
        sizes = (total, shape.block_size, len(shape.heads_of(rank)), shape.head_dim)
        kv = [LayerKvCache(torch.full(sizes, -1.0), torch.full(sizes, -1.0)) for _ in range(shape.layers)]
        states = []
        if state is not None:
            heads = len(shape.key_heads_of(rank))
            channels = heads * (2 * state.key_dim + state.value_heads * state.value_dim)
            recurrent = (SLOTS, heads * state.value_heads, state.key_dim, state.value_dim)
            states = [
                LayerState(torch.full((SLOTS, state.taps, channels), -1.0), torch.full(recurrent, -1.0))
                for _ in range(state.layers)
            ]
        return RequestCache(kv, states, shape.block_size, self.blocks, self.slot, tokens)

    def _fill(self, rank: int, cache: RequestCache) -> None:
        for views in self.views(rank, cache):
            for name, view in views.items():
                first = 64 * (zlib.crc32(repr(name).encode()) % (1 << 17))
                view.copy_(first + torch.arange(view.numel()).view(view.shape))

    def views(self, rank: int, cache: RequestCache) -> list[dict[tuple[Any, ...], torch.Tensor]]:
        """Every (layer, kind, head, token), and every part of the state, by its place in the whole model."""
        shape, state = self.shape, self.shape.state
        kv: dict[tuple[Any, ...], torch.Tensor] = {}
        for number, layer in enumerate(cache.kv):
            for kind, part in (("keys", layer.keys), ("values", layer.values)):
                for place, head in enumerate(shape.heads_of(rank)):
                    for token in range(cache.tokens):
                        row = part[self.blocks[token // shape.block_size], token % shape.block_size, place]
                        kv[number, kind, head, token] = row
        kept: dict[tuple[Any, ...], torch.Tensor] = {}
        if state is not None:
            heads = shape.key_heads_of(rank)
            widths = {"q": state.key_dim, "k": state.key_dim, "v": state.value_heads * state.value_dim}
            for number, layer in enumerate(cache.states):
                before = 0
                for kind, width in widths.items():
                    for place, head in enumerate(heads):
                        start = before + place * width
                        kept[number, kind, head] = layer.convolution[self.slot, :, start : start + width]
                    before += len(heads) * width
                for place, head in enumerate(heads):
                    start = place * state.value_heads
                    kept[number, "matrix", head] = layer.recurrent[self.slot, start : start + state.value_heads]
        return [kv, kept]

    def content(self) -> dict[tuple[Any, ...], list[float]]:
        """Everything that belongs to the request, the same on all ranks that hold it."""
        whole: dict[tuple[Any, ...], list[float]] = {}
        for rank, cache in enumerate(self.caches):
            for views in self.views(rank, cache):
                for name, view in views.items():
                    values = view.flatten().tolist()
                    assert whole.setdefault(name, values) == values
        return whole

    def untouched(self) -> bool:
        """Nothing outside the request's blocks and slot was written."""
        rows = set(self.blocks)
        for cache in self.caches:
            for layer in cache.kv:
                others = [block for block in range(len(layer.keys)) if block not in rows]
                if not bool((layer.keys[others] == -1).all() and (layer.values[others] == -1).all()):
                    return False
            for state in cache.states:
                others = [slot for slot in range(SLOTS) if slot != self.slot]
                if not bool((state.convolution[others] == -1).all() and (state.recurrent[others] == -1).all()):
                    return False
        return True


def move(plan: TransferPlan, sending: Gang, receiving: Gang, piece_bytes: int = 1 << 20) -> tuple[int, int]:
    """All ranks' parts, over pipes that never block; bytes sent and received."""
    pipes = {(part.sender, part.receiver): Pipe() for part in plan.parts}
    sent = received = 0
    for rank, cache in enumerate(sending.caches):
        senders = {part.receiver: Lane(pipes[rank, part.receiver], piece_bytes) for part in plan.of_sender(rank)}
        sent += send_cache(plan, rank, cache, senders)
    for rank, cache in enumerate(receiving.caches):
        receivers = {part.sender: Lane(pipes[part.sender, rank], piece_bytes) for part in plan.of_receiver(rank)}
        received += receive_cache(plan, rank, cache, receivers)
    assert not any(pipe.items for pipe in pipes.values())
    return sent, received


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.tuples(st.sampled_from(RANKS[:3]), st.sampled_from(RANKS[:3])),
    block_sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kv_heads=st.sampled_from([1, 2, 4]),
    layers=st.integers(1, 9),
    tokens=st.integers(1, 20),
    piece_bytes=st.integers(1, 4000),
    state=st.sampled_from([None, STATE]),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_every_layer_head_and_token_arrives_in_the_receivers_own_blocks(
    ranks: tuple[int, int],
    block_sizes: tuple[int, int],
    kv_heads: int,
    layers: int,
    tokens: int,
    piece_bytes: int,
    state: StateLayout | None,
    seeds: tuple[int, int],
) -> None:
    """Between any sizes of gangs, blocks and pieces; states too. What is not the request's stays as it was."""
    shapes = [
        layout(count, kv_heads=kv_heads, block_size=size, layers=layers, state=state)
        for count, size in zip(ranks, block_sizes, strict=True)
    ]
    plan = plan_transfer(shapes[0], shapes[1])
    sending = Gang(shapes[0], tokens, seeds[0], filled=True)
    receiving = Gang(shapes[1], tokens, seeds[1], filled=False)
    sent, received = move(plan, sending, receiving, piece_bytes)
    assert sent == received
    assert receiving.content() == sending.content()
    assert receiving.untouched()


ROW = 2 * 4 * 2 * 4
"""Bytes of one token in a layer of `layout`, where one rank holds all heads."""


def cut(layers: int, tokens: int, most_rows: int) -> list[tuple[range, int, int]]:
    """The pieces of a request between two gangs of one rank."""
    plan = plan_transfer(layout(layers=layers), layout(layers=layers))
    pieces = plan.pieces(plan.parts[0], tokens, most_rows * ROW)
    return [(piece.layers, piece.first, piece.count) for piece in pieces]


def test_a_long_request_goes_in_pieces_of_one_layer_and_of_about_one_size() -> None:
    spans = [(0, 3), (3, 3), (6, 2)]
    assert cut(2, 8, 3) == [(range(layer, layer + 1), *span) for layer in (0, 1) for span in spans]


def test_a_short_request_goes_in_four_pieces_of_several_layers() -> None:
    """One would leave nothing to gather while it is on its way, one for each layer would be more than it takes."""
    assert cut(12, 8, 1000) == [(range(first, first + 3), 0, 8) for first in (0, 3, 6, 9)]
    assert cut(10, 8, 1000)[-1] == (range(8, 10), 0, 8)


def test_no_piece_is_larger_than_the_limit() -> None:
    assert cut(12, 8, 16) == [(range(first, first + 2), 0, 8) for first in range(0, 12, 2)]


def test_the_pieces_of_several_parts_take_turns_in_one_order_on_both_sides() -> None:
    """By number, sender and receiver, even where one has fewer pieces: so no ranks wait for each other in a ring."""
    plan = plan_transfer(layout(2, kv_heads=4), layout(4, kv_heads=4))
    most = {(part.sender, part.receiver): ROW for part in plan.parts} | {(0, 1): 1 << 20}

    def order(parts: list[Part]) -> list[tuple[int, int, int]]:
        counts = dict.fromkeys(most, 0)
        turns = []
        for part, _ in plan.turns(parts, 6, most):
            counts[part.sender, part.receiver] += 1
            turns.append((counts[part.sender, part.receiver], part.sender, part.receiver))
        return turns

    for rank in range(2):
        assert order(plan.of_sender(rank)) == sorted(order(plan.of_sender(rank)))
    assert [turn[2] for turn in order(plan.of_sender(0))] == [0, 1] * 3 + [0] * 3


@pytest.mark.parametrize("wrong", [None, torch.zeros(1, 2, 5, 4, 3), torch.zeros(1, 2, 5, 4, 2, dtype=torch.float64)])
def test_what_is_not_what_the_plan_says_is_refused(wrong: torch.Tensor | None) -> None:
    plan = plan_transfer(layout(), layout())
    pipe = Pipe()
    if wrong is not None:
        pipe.items.append(wrong)
    receiving = Gang(plan.target, 5, 2, filled=False)
    with pytest.raises(KvPipeError, match=r"expected torch\.float32 of shape \(1, 2, 5, 4, 2\)"):
        receive_cache(plan, 0, receiving.caches[0], {0: Lane(pipe, 1 << 20)})
