"""Which rank sends what to which rank, and that it arrives in the right place: every layer, head, token and state."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections import deque
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel_worker.kv import plan as planning
from tpmodel_worker.kv.errors import KvMismatchError, KvPipeError
from tpmodel_worker.kv.layout import KvLayout, StateLayout
from tpmodel_worker.kv.plan import TransferPlan, plan_transfer
from tpmodel_worker.kv.transfer import RequestCache, receive_cache, send_cache
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

    def receive(self) -> torch.Tensor | None:
        return self.items.popleft() if self.items else None


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


def move(plan: TransferPlan, sending: Gang, receiving: Gang) -> tuple[int, int]:
    """All ranks' parts, over pipes that never block; bytes sent and received."""
    pipes = {(part.sender, part.receiver): Pipe() for part in plan.parts}
    sent = received = 0
    for rank, cache in enumerate(sending.caches):
        ends = {part.receiver: pipes[rank, part.receiver] for part in plan.of_sender(rank)}
        sent += send_cache(plan, rank, cache, ends)
    for rank, cache in enumerate(receiving.caches):
        ends = {part.sender: pipes[part.sender, rank] for part in plan.of_receiver(rank)}
        received += receive_cache(plan, rank, cache, ends)
    assert not any(pipe.items for pipe in pipes.values())
    return sent, received


@settings(max_examples=80, deadline=None)
@given(
    ranks=st.tuples(st.sampled_from(RANKS[:3]), st.sampled_from(RANKS[:3])),
    block_sizes=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kv_heads=st.sampled_from([1, 2, 4]),
    tokens=st.integers(1, 20),
    state=st.sampled_from([None, STATE]),
    seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_every_layer_head_and_token_arrives_in_the_receivers_own_blocks(
    ranks: tuple[int, int],
    block_sizes: tuple[int, int],
    kv_heads: int,
    tokens: int,
    state: StateLayout | None,
    seeds: tuple[int, int],
) -> None:
    """Between any two sizes of gangs and blocks; states too. What is not the request's stays as it was."""
    shapes = [
        layout(count, kv_heads=kv_heads, block_size=size, state=state)
        for count, size in zip(ranks, block_sizes, strict=True)
    ]
    plan = plan_transfer(shapes[0], shapes[1])
    sending = Gang(shapes[0], tokens, seeds[0], filled=True)
    receiving = Gang(shapes[1], tokens, seeds[1], filled=False)
    sent, received = move(plan, sending, receiving)
    assert sent == received
    assert receiving.content() == sending.content()
    assert receiving.untouched()


def test_a_long_request_goes_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one piece of a layer is gathered at a time."""
    row = 2 * 2 * 2 * 4
    monkeypatch.setattr(planning, "PIECE_BYTES", 3 * row)
    plan = plan_transfer(layout(2), layout(2))
    assert [piece.count for piece in plan.pieces(8)] == [3, 3, 2] * 3
    assert [piece.first for piece in plan.pieces(8)] == [0, 3, 6] * 3
    sending, receiving = Gang(plan.source, 8, 1, filled=True), Gang(plan.target, 8, 2, filled=False)
    move(plan, sending, receiving)
    assert receiving.content() == sending.content()


@pytest.mark.parametrize("wrong", [None, torch.zeros(2, 5, 4, 3), torch.zeros(2, 5, 4, 2, dtype=torch.float64)])
def test_what_is_not_what_the_plan_says_is_refused(wrong: torch.Tensor | None) -> None:
    plan = plan_transfer(layout(), layout())
    pipe = Pipe()
    if wrong is not None:
        pipe.items.append(wrong)
    receiving = Gang(plan.target, 5, 2, filled=False)
    with pytest.raises(KvPipeError, match=r"expected torch\.float32 of shape \(2, 5, 4, 2\)"):
        receive_cache(plan, 0, receiving.caches[0], {0: pipe})
