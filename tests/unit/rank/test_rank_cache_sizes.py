"""How the memory of a rank's caches is divided among blocks, states and snapshots of them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tpmodel_worker.models.batch import StateShape
from tpmodel_worker.rank.cache_sizes import KvDemand, KvShape, StateMemory, available_blocks, available_snapshots
from tpmodel_worker.rank.errors import RequestError

CPU = torch.device("cpu")
BLOCK, SLOTS = 8, 3
STATE = StateShape(channels=7, taps=3, value_heads=2, key_dim=4, value_dim=6)
MEMORY = StateMemory(STATE, layers=2, slots=SLOTS, dtype=torch.bfloat16)
SHAPE = KvShape(layers=1, kv_heads=1, head_dim=2, block_size=BLOCK, dtype=torch.bfloat16, states=MEMORY)
STATE_BYTES = 256 + 1280
"""Features of 2 layers, 3 slots, 3 tokens and 7 channels take 252 bytes, the recurrent state in float32 1152: each
rounded up to a multiple of 256."""


def demand(**changes: int) -> KvDemand:
    numbers = {
        "kv_cache_bytes": 0,
        "max_num_seqs": SLOTS,
        "max_model_len": 64,
        "activation_bytes": 0,
        "weights_bytes": 0,
        "ranks_on_host": 1,
    }
    return KvDemand(**(numbers | changes))


def test_states_are_part_of_the_memory_that_was_asked_for() -> None:
    assert SHAPE.state_bytes == STATE_BYTES
    assert available_blocks(SHAPE, demand(kv_cache_bytes=STATE_BYTES + 10 * SHAPE.block_bytes), CPU) == 9


def test_memory_without_room_for_the_states_is_refused_with_both_numbers() -> None:
    with pytest.raises(RequestError) as refusal:
        available_blocks(SHAPE, demand(kv_cache_bytes=STATE_BYTES), CPU)
    assert f"({STATE_BYTES} of them for the recurrent state of max_num_seqs = 3 sequences)" in str(refusal.value)


def test_snapshots_take_a_tenth_of_what_the_states_leave_unless_their_number_is_given() -> None:
    snapshot = 2 * (3 * 7 * 2 + 2 * 4 * 6 * 4)
    assert MEMORY.snapshot_bytes == snapshot
    memory = STATE_BYTES + 30 * snapshot
    assert available_snapshots(SHAPE, demand(kv_cache_bytes=memory), CPU) == 3
    assert available_snapshots(SHAPE, demand(kv_cache_bytes=1000 * memory), CPU) == 4 * SLOTS
    assert available_snapshots(SHAPE, demand(kv_cache_bytes=memory, state_snapshots=5), CPU) == 5
    assert available_snapshots(dataclasses.replace(SHAPE, states=None), demand(kv_cache_bytes=memory), CPU) == 0


def test_blocks_are_what_slots_and_snapshots_leave() -> None:
    shape = SHAPE.with_snapshots(5)
    states = 768 + 3072  # 8 rows: 672 and 3072 bytes
    assert shape.state_bytes == states
    assert available_blocks(shape, demand(kv_cache_bytes=states + 10 * shape.block_bytes), CPU) == 9
    with pytest.raises(RequestError, match="of max_num_seqs = 3 sequences and 5 snapshots"):
        available_blocks(shape, demand(kv_cache_bytes=states), CPU)
