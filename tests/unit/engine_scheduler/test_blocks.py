"""The block pool: holders, free blocks, and cached ones."""

from __future__ import annotations

import pytest

from tpmodel_worker.engine.blocks import BlockPool


def test_allocated_blocks_are_distinct_and_counted():
    pool = BlockPool(4)
    blocks = pool.allocate(3)
    assert len(set(blocks)) == 3
    assert (pool.used, pool.available) == (3, 1)


def test_allocating_more_than_there_is_takes_nothing():
    pool = BlockPool(4)
    with pytest.raises(ValueError, match="5 blocks asked for, 4 available"):
        pool.allocate(5)
    assert pool.available == 4


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.used == 1
    pool.release(blocks)
    assert pool.used == 0


def test_releasing_a_free_block_is_an_error():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(ValueError, match="not held"):
        pool.release(blocks)


def test_a_released_block_with_a_hash_is_found_until_it_is_given_away():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"first")
    pool.release(blocks)
    assert (pool.available, pool.cached) == (2, 1)
    assert pool.match([b"first"]) == blocks
    pool.allocate(2)
    assert pool.match([b"first"]) == []


def test_free_blocks_are_given_away_before_cached_ones():
    pool = BlockPool(3)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"first")
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match([b"first"]) == blocks


def test_the_least_recently_released_cached_block_is_given_away_first():
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], b"first")
    pool.register(second[0], b"second")
    pool.release(second)
    pool.release(first)
    assert pool.allocate(1) == second
    assert pool.match([b"first"]) == first


def test_the_tail_of_a_cached_prefix_is_given_away_before_its_head():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    chain = [b"0", b"1", b"2"]
    for block, block_hash in zip(blocks, chain, strict=True):
        pool.register(block, block_hash)
    pool.release(blocks)
    assert pool.allocate(1) == blocks[2:]
    assert pool.match(chain) == blocks[:2]


def test_sharing_a_cached_block_keeps_it_from_being_given_away():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.register(blocks[0], b"first")
    pool.release(blocks)
    assert pool.unheld(blocks) == 1
    pool.share(blocks)
    assert pool.unheld(blocks) == 0
    assert pool.allocate(1) != blocks
    assert pool.available == 0


def test_the_first_block_of_a_content_keeps_the_name():
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], b"same")
    pool.register(second[0], b"same")
    assert pool.match([b"same"]) == first
    assert pool.hash_of(second[0]) is None


def test_a_match_ends_at_the_first_unknown_hash():
    pool = BlockPool(3)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"0")
    pool.register(blocks[1], b"2")
    assert pool.match([b"0", b"1", b"2"]) == blocks[:1]


def test_a_hash_is_forgotten_when_its_block_is_given_away_and_not_before():
    forgotten: list[bytes] = []
    pool = BlockPool(2, forgotten=forgotten.append)
    for block, block_hash in zip(pool.allocate(2), (b"first", b"second"), strict=True):
        pool.register(block, block_hash)
        pool.release([block])
    assert (pool.is_known(b"first"), forgotten) == (True, [])
    pool.allocate(1)
    assert (pool.is_known(b"first"), pool.is_known(b"second"), forgotten) == (False, True, [b"first"])
