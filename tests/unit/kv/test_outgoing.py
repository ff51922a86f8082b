"""How far each item of a sender is, and which answers of the peer can be."""

from __future__ import annotations

import pytest
import torch

from tpmodel_worker.kv.errors import KvHeaderError
from tpmodel_worker.kv.header import Header, ItemKind, tensor_header
from tpmodel_worker.kv.outgoing import Item, Outgoing


def announced(*sizes: int) -> Outgoing:
    """Items of so many bytes, 0: no tensor; the peer has heard of all."""
    outgoing = Outgoing()
    for size in sizes:
        tensor = torch.empty(size, dtype=torch.uint8)
        outgoing.add(Item(tensor_header(tensor, 0) if size else Header(ItemKind.NONE, 0), tensor, None))
    while outgoing.announce() is not None:
        pass
    return outgoing


def test_bytes_count_until_they_have_arrived() -> None:
    """K51."""
    outgoing = announced(10, 20)
    assert outgoing.bytes == 30
    outgoing.ask(0)
    outgoing.ask(1)
    assert outgoing.bytes == 30
    outgoing.arrive(0)
    assert (outgoing.bytes, len(outgoing)) == (20, 1)


def test_what_has_no_bytes_is_not_asked_for() -> None:
    """K49."""
    outgoing = announced(0, 10)
    assert outgoing.ask(1).header.sequence == 1
    outgoing.arrive(0)
    outgoing.arrive(1)
    assert len(outgoing) == 0


@pytest.mark.parametrize("sequence", [1, 2, 1 << 60])
def test_items_are_asked_for_in_order(sequence: int) -> None:
    """K50."""
    with pytest.raises(KvHeaderError, match=f"asked for item {sequence}"):
        announced(10, 20).ask(sequence)


def test_nothing_is_asked_for_twice_or_before_it_was_announced() -> None:
    outgoing = announced(10)
    outgoing.ask(0)
    with pytest.raises(KvHeaderError, match="asked for item 0"):
        outgoing.ask(0)
    outgoing.add(Item(tensor_header(torch.empty(1), 0), torch.empty(1), None))
    with pytest.raises(KvHeaderError, match="asked for item 1"):
        outgoing.ask(1)


@pytest.mark.parametrize("sequence", [0, 1])
def test_nothing_has_arrived_that_was_not_sent(sequence: int) -> None:
    with pytest.raises(KvHeaderError, match=f"has item {sequence}, which can't be"):
        announced(10, 20).arrive(sequence)


def test_the_peer_may_be_silent_while_it_knows_of_nothing() -> None:
    """K53."""
    outgoing = announced(10)
    left = outgoing.seconds_left(100)
    assert left is not None
    assert 0 < left <= 100
    assert outgoing.seconds_left(0) == 0
    outgoing.ask(0)
    outgoing.arrive(0)
    assert outgoing.seconds_left(0) is None


def test_a_broken_direction_gives_all_bytes_back() -> None:
    """K52."""
    outgoing = announced(10, 20)
    outgoing.clear()
    assert (outgoing.bytes, len(outgoing)) == (0, 0)
