"""The caches of a rank by layer, and copies of recurrent state between slots and snapshots."""

from __future__ import annotations

import torch

from tpmodel_worker.models.batch import LayerKvCache, LayerState, StateShape
from tpmodel_worker.rank.cache_sizes import KvShape, StateMemory
from tpmodel_worker.rank.kv_cache import KvCache

CPU = torch.device("cpu")
BLOCK, SLOTS = 8, 3
STATE = StateShape(channels=7, taps=3, value_heads=2, key_dim=4, value_dim=6)
MEMORY = StateMemory(STATE, layers=2, slots=SLOTS, dtype=torch.bfloat16)
SHAPE = KvShape(layers=1, kv_heads=1, head_dim=2, block_size=BLOCK, dtype=torch.bfloat16, states=MEMORY)


def test_layers_get_what_they_keep_and_a_reset_empties_only_its_slots(arenas) -> None:
    cache = KvCache(SHAPE, 5, keeps_state=[True, False, True], rank=0, device=CPU, arenas=arenas)
    first, attention, second = cache.layers
    assert isinstance(first, LayerState)
    assert isinstance(attention, LayerKvCache)
    assert isinstance(second, LayerState)
    assert attention.keys.shape == (6, BLOCK, 1, 2)
    for state in (first, second):
        assert (state.convolution.shape, state.convolution.dtype) == ((SLOTS, 3, 7), torch.bfloat16)
        assert (state.recurrent.shape, state.recurrent.dtype) == ((SLOTS, 2, 4, 6), torch.float32)
        state.convolution.fill_(1)
        state.recurrent.fill_(float("nan"))
    attention.keys.fill_(1)
    cache.reset_states([2, 0])
    for state in (first, second):
        for part in (state.convolution, state.recurrent):
            assert not part[[0, 2]].any()
            assert part[1].all()
    assert attention.keys.all()


def test_copies_of_state_touch_only_the_rows_that_are_named(arenas) -> None:
    """In every layer, of both parts; what is copied twice is what it was the first time."""
    cache = KvCache(SHAPE.with_snapshots(2), 5, keeps_state=[True, False, True], rank=0, device=CPU, arenas=arenas)
    states = [layer for layer in cache.layers if isinstance(layer, LayerState)]
    parts = [part for state in states for part in (state.convolution, state.recurrent)]
    for number, part in enumerate(parts):
        assert len(part) == SLOTS + 2
        for row in range(len(part)):
            part[row] = 10 * number + row

    def rows() -> list[list[float]]:
        assert all((part == part.flatten(1)[:, :1].view(-1, *[1] * (part.dim() - 1))).all() for part in parts)
        return [[value - 10 * number for value in part.flatten(1)[:, 0].tolist()] for number, part in enumerate(parts)]

    cache.save_states([2, 0], [0, 1])
    assert rows() == [[0, 1, 2, 2, 0]] * 4
    cache.reset_states([0, 2])
    assert [row[1:2] + row[3:] for row in rows()] == [[1, 2, 0]] * 4
    cache.restore_states([0, 0], [0, 1])
    assert [row[:2] + row[3:] for row in rows()] == [[2, 2, 2, 0]] * 4
