"""Which pipes outlive a transfer, and for how long."""

from __future__ import annotations

import threading
import time

import pytest

from support.waiting import until
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.pipe_pool import Lasting, PipePool

LONG = 600.0
SHORT = 0.01


class Pipe:
    """Counts what is done to it."""

    def __init__(self) -> None:
        self.broken = False
        self.reasons: list[str] = []
        self.closed = threading.Event()

    def abort(self, reason: str) -> None:
        self.broken = True
        self.reasons.append(reason)

    def close(self) -> None:
        self.closed.set()
        if self.reasons:
            raise KvPipeError(self.reasons[0])


def lasting(pool: PipePool[Pipe], peer: str = "1 of a world", *, closes: bool = True) -> Lasting[Pipe]:
    """In use."""
    entry = Lasting("name", peer, Pipe(), closes)
    pool.lend(entry)
    return entry


def no_thread_left() -> bool:
    return all(thread.name != "kv pipes" for thread in threading.enumerate())


@pytest.fixture
def pool() -> PipePool[Pipe]:
    """Nothing ends by itself in the time of a test."""
    return PipePool(idle_seconds=LONG, look_seconds=SHORT)


def test_what_was_put_back_is_taken_by_the_next_transfer_to_the_same_peer(pool: PipePool[Pipe]) -> None:
    entry = lasting(pool)
    pool.put(entry)
    assert pool.take("1 of another world") is None
    assert pool.take("1 of a world") is entry
    assert pool.take("1 of a world") is None, "one transfer has it"
    pool.end(entry)


def test_one_that_breaks_is_not_used_again_and_is_closed(pool: PipePool[Pipe]) -> None:
    entry = lasting(pool)
    pool.put(entry)
    entry.pipe.broken = True
    assert pool.take(entry.peer) is None
    assert entry.pipe.closed.wait(20)
    until(no_thread_left, "the thread has ended")


def test_only_the_end_that_begins_transfers_closes_what_is_idle() -> None:
    """The other one might do so just as it is used."""
    pool: PipePool[Pipe] = PipePool(idle_seconds=SHORT, look_seconds=SHORT)
    sending, receiving = lasting(pool), lasting(pool, "name", closes=False)
    pool.put(sending)
    pool.put(receiving)
    assert sending.pipe.closed.wait(20)
    assert sending.pipe.reasons == []
    assert pool.take("name") is receiving
    pool.end(receiving)
    until(no_thread_left, "the thread has ended")


def test_one_that_ends_is_broken_off_and_closed_in_the_background(pool: PipePool[Pipe]) -> None:
    entry = lasting(pool)
    pool.end(entry, "the transfer failed")
    assert entry.pipe.broken, "at once"
    assert entry.pipe.closed.wait(20)
    until(no_thread_left, "the thread has ended")


def test_the_end_of_a_world_ends_all_that_are_idle_and_leaves_those_in_use_to_their_transfers(
    pool: PipePool[Pipe],
) -> None:
    idle, used = lasting(pool), lasting(pool)
    pool.put(idle)
    pool.drain("the epoch ends")
    assert idle.pipe.closed.wait(20)
    assert idle.pipe.reasons == ["the epoch ends"]
    assert not used.pipe.broken
    assert len(pool) == 0
    pool.end(used)


def test_who_comes_while_the_transfer_before_is_about_to_end_waits_for_its_pipe(pool: PipePool[Pipe]) -> None:
    entry = lasting(pool, "name", closes=False)
    later = threading.Timer(0.05, pool.put, (entry,))
    later.start()
    assert pool.take("name", wait_seconds=20) is entry
    pool.end(entry)


def test_who_comes_for_one_that_is_not_there_does_not_wait(pool: PipePool[Pipe]) -> None:
    started = time.monotonic()
    assert pool.take("name", wait_seconds=LONG) is None
    assert time.monotonic() - started < LONG


def test_who_waits_for_one_that_ends_gets_none(pool: PipePool[Pipe]) -> None:
    entry = lasting(pool, "name", closes=False)
    later = threading.Timer(0.05, pool.end, (entry, "the transfer failed"))
    later.start()
    assert pool.take("name", wait_seconds=LONG) is None
