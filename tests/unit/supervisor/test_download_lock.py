"""The lock of a shared cache: one holder at a time, and none for ever."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from support.waiting import until
from tpmodel_worker.supervisor.download_lock import DownloadLock


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "commit.lock"


def test_one_of_two_gets_the_lock_and_the_other_after_it(path: Path) -> None:
    first, second = DownloadLock(path, "first"), DownloadLock(path, "second")
    assert first.try_acquire()
    assert not second.try_acquire()
    assert second.holder == "first"
    first.release()
    assert second.try_acquire()
    second.release()
    assert not path.exists()


def test_a_holder_that_lives_keeps_the_lock(path: Path) -> None:
    """Its beats are what counts, however often somebody looks."""
    holder, other = DownloadLock(path, "holder", stale_seconds=0.3), DownloadLock(path, "other", stale_seconds=0.3)
    assert holder.try_acquire()
    deadline = time.monotonic() + 1.5
    while time.monotonic() < deadline:
        assert not other.try_acquire()
        time.sleep(0.02)
    assert not holder.lost
    holder.release()


def test_a_dead_holders_lock_is_taken_over_after_a_minute_of_the_observers_own_time(path: Path) -> None:
    path.write_text(json.dumps({"owner": "dead", "beat": "7"}))
    clock = Clock()
    other = DownloadLock(path, "other", clock=clock)
    assert not other.try_acquire()
    clock.now = 59.9
    assert not other.try_acquire()
    clock.now = 60
    assert other.try_acquire()
    assert json.loads(path.read_text())["owner"] == "other"
    other.release()
    assert list(path.parent.iterdir()) == []


def test_a_beat_starts_the_minute_again(path: Path) -> None:
    path.write_text(json.dumps({"owner": "slow", "beat": "1"}))
    clock = Clock()
    other = DownloadLock(path, "other", clock=clock)
    other.try_acquire()
    clock.now = 50
    path.write_text(json.dumps({"owner": "slow", "beat": "2"}))
    assert not other.try_acquire()
    clock.now = 100
    assert not other.try_acquire()
    clock.now = 110
    assert other.try_acquire()
    other.release()


def test_the_age_of_the_file_means_nothing(path: Path) -> None:
    """The clocks of machines differ."""
    path.write_text(json.dumps({"owner": "elsewhere", "beat": "1"}))
    os.utime(path, (0, 0))
    assert not DownloadLock(path, "other").try_acquire()


def test_what_a_pod_held_before_it_was_killed_is_its_own(path: Path) -> None:
    path.write_text(json.dumps({"owner": "pod", "beat": "3"}))
    again = DownloadLock(path, "pod")
    assert again.try_acquire()
    again.release()


def test_a_higher_attempt_of_the_same_gang_takes_over_at_once(path: Path) -> None:
    """All pods of the lower one were told to end, and a restart must not wait for a dead one's lock."""
    held = DownloadLock(path, "old pod", gang="chat-0", attempt=1)
    assert held.try_acquire()
    new = DownloadLock(path, "new pod", gang="chat-0", attempt=2)
    assert new.try_acquire()
    held.release()
    assert not DownloadLock(path, "old pod", gang="chat-0", attempt=1).try_acquire()
    new.release()


@pytest.mark.parametrize(("gang", "attempt"), [("chat-0", 2), ("chat-0", 1), ("chat-1", 3), ("", 3)])
def test_nobody_else_does(path: Path, gang: str, attempt: int) -> None:
    held = DownloadLock(path, "holder", gang="chat-0", attempt=2)
    assert held.try_acquire()
    assert not DownloadLock(path, "other", gang=gang, attempt=attempt).try_acquire()
    held.release()


def test_a_lock_whose_maker_died_before_it_wrote_is_taken_over_too(path: Path) -> None:
    path.touch()
    clock = Clock()
    other = DownloadLock(path, "other", clock=clock)
    assert not other.try_acquire()
    clock.now = 60
    assert other.try_acquire()
    other.release()


def test_a_holder_finds_out_that_it_was_taken_for_dead_and_leaves_the_new_lock_alone(path: Path) -> None:
    stopped = DownloadLock(path, "stopped", stale_seconds=0.3)
    assert stopped.try_acquire()
    path.unlink()
    other = DownloadLock(path, "other")
    assert other.try_acquire()
    until(lambda: stopped.lost, "the loss is noticed")
    stopped.release()
    assert json.loads(path.read_text())["owner"] == "other"
    other.release()


def test_of_many_that_find_a_dead_holder_one_gets_the_lock(path: Path) -> None:
    path.write_text(json.dumps({"owner": "dead", "beat": "1"}))
    clock = Clock()
    locks = [DownloadLock(path, f"pod {index}", clock=clock) for index in range(8)]
    assert not any(lock.try_acquire() for lock in locks)
    clock.now = 60
    acquired = [lock for lock in locks if lock.try_acquire()]
    assert len(acquired) == 1
    acquired[0].release()
