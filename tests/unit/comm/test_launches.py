"""Launches of collectives against the end of their epoch (P17, W26)."""

from __future__ import annotations

import threading

import pytest

from tpmodel_worker.comm.launches import EpochOverError, Launches


class Group:
    """Counts how often it is aborted, and notes whether a launch was under way then."""

    def __init__(self) -> None:
        self.launching = False
        self.aborted_while_launching: list[bool] = []

    def abort(self) -> None:
        self.aborted_while_launching.append(self.launching)


def launch_until(launches: Launches, group: Group, begun: threading.Event, done: threading.Event) -> threading.Thread:
    def run() -> None:
        with launches.launch():
            group.launching = True
            begun.set()
            done.wait(30)
            group.launching = False

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_no_launch_is_let_through_after_the_end() -> None:
    launches, group = Launches(), Group()
    launches.end("rank 1 died", group.abort)
    with pytest.raises(EpochOverError, match="rank 1 died"), launches.launch():
        pytest.fail("it was launched")


def test_a_launch_that_is_under_way_comes_to_its_end_before_the_abort() -> None:
    launches, group, begun, done = Launches(launch_seconds=30), Group(), threading.Event(), threading.Event()
    launching = launch_until(launches, group, begun, done)
    assert begun.wait(30)
    ending = threading.Thread(target=launches.end, args=("a peer died", group.abort))
    ending.start()
    assert group.aborted_while_launching == []
    done.set()
    launching.join(30)
    ending.join(30)
    assert group.aborted_while_launching == [False]


def test_a_launch_that_hangs_is_aborted_where_it_stands() -> None:
    launches, group, begun, done = Launches(launch_seconds=0.01), Group(), threading.Event(), threading.Event()
    launching = launch_until(launches, group, begun, done)
    assert begun.wait(30)
    launches.end("a peer died", group.abort)
    assert group.aborted_while_launching == [True]
    done.set()
    launching.join(30)
    assert launches.over


def test_the_group_is_aborted_once_and_the_first_reason_stays() -> None:
    launches, group = Launches(), Group()
    launches.end("a peer died", group.abort)
    launches.end("it was closed", group.abort)
    assert group.aborted_while_launching == [False]
    with pytest.raises(EpochOverError, match="a peer died"):
        launches.check()


def test_a_failing_abort_still_ends_the_epoch() -> None:
    launches = Launches()

    def fail() -> None:
        raise RuntimeError("NCCL is gone")

    with pytest.raises(RuntimeError, match="NCCL is gone"):
        launches.end("a peer died", fail)
    with pytest.raises(EpochOverError), launches.launch():
        pytest.fail("it was launched")
