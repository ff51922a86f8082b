"""Names of blocks: equal for equal beginnings only."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpmodel_worker.engine.prefix_hash import extend_chain, root_hash

token_ids = st.lists(st.integers(0, 2), max_size=12)


def chain_of(tokens: list[int], block_size: int = 2, weight_version: int = 1) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, root_hash(weight_version), tokens, block_size, len(tokens) // block_size)
    return chain


@given(token_ids, token_ids)
def test_two_blocks_share_a_name_exactly_when_everything_up_to_them_is_equal(first: list[int], second: list[int]):
    for index, (one, other) in enumerate(zip(chain_of(first), chain_of(second), strict=False)):
        end = 2 * (index + 1)
        assert (one == other) == (first[:end] == second[:end])


def test_a_chain_grows_without_changing():
    tokens = list(range(10))
    chain = chain_of(tokens[:4])
    extend_chain(chain, root_hash(1), tokens, 2, 5)
    assert chain == chain_of(tokens)


def test_another_weight_version_has_other_names():
    assert not set(chain_of([1, 2, 3, 4], weight_version=1)) & set(chain_of([1, 2, 3, 4], weight_version=2))


def test_the_largest_token_id_has_a_name():
    assert chain_of([2**32 - 1, 0]) != chain_of([0, 0])
