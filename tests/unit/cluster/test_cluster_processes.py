"""Background programs that are found again by their files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cluster.errors import ClusterError
from tests.cluster.processes import Daemon, kill_forgotten, run
from tests.cluster.waiting import wait_until

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]
# A wrapper with a child of the same group, as nsenter is.
WRAPPER = [sys.executable, "-c", f"import subprocess; subprocess.run({SLEEP!r})"]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(name="program", folder=tmp_path)
    yield daemon
    daemon.kill()


def test_another_process_finds_and_ends_what_one_has_started(daemon: Daemon) -> None:
    daemon.start(SLEEP)
    found = Daemon(name="program", folder=daemon.folder)
    assert found.running()
    assert found.pid() == daemon.pid()
    found.signal(signal.SIGKILL)
    wait_until(lambda: not daemon.running(), what="end", seconds=10)


def test_start_leaves_a_running_program_alone(daemon: Daemon) -> None:
    daemon.start(SLEEP)
    first = daemon.pid()
    daemon.start(SLEEP)
    assert daemon.pid() == first


def test_kill_ends_what_the_program_wraps(daemon: Daemon) -> None:
    daemon.start(WRAPPER)
    inside = wait_until(lambda: daemon.members()[1:], what="the wrapped program", seconds=10)
    daemon.kill()
    assert not [pid for pid in inside if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_kill_ends_what_is_left_when_the_wrapper_has_died(daemon: Daemon) -> None:
    daemon.start(WRAPPER)
    wait_until(lambda: len(daemon.members()) == 2, what="the wrapped program", seconds=10)
    pid = daemon.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not daemon.running(), what="end of the wrapper", seconds=10)
    assert len(daemon.members()) == 1
    daemon.kill()
    assert daemon.members() == []


def test_a_record_of_another_process_with_the_same_number_is_not_believed(daemon: Daemon) -> None:
    daemon.folder.mkdir(exist_ok=True)
    (daemon.folder / "program.pid").write_text(f'{{"pid": {os.getpid()}, "started": 1.0}}')
    assert daemon.pid() is None
    assert not daemon.running()
    daemon.kill()


def test_programs_whose_records_are_lost_are_ended(tmp_path: Path) -> None:
    programs = Path(psutil.Process().exe()).parent
    lost, other = subprocess.Popen(SLEEP, cwd=tmp_path), subprocess.Popen(SLEEP, cwd="/")
    try:
        kill_forgotten(tmp_path, programs)
        assert not psutil.pid_exists(lost.pid)
        assert other.poll() is None
    finally:
        for process in (lost, other):
            process.kill()
            process.wait()


def test_a_failed_command_says_what_it_wrote() -> None:
    with pytest.raises(ClusterError, match=r"exit code 3\nno such thing"):
        run(["sh", "-c", "echo no such thing; exit 3"])


def test_waiting_explains_itself_past_its_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(ClusterError, match="a miracle: not within 0 s\nthe log's end"):
        wait_until(lambda: None, what="a miracle", seconds=0.2, explain=lambda: "the log's end")
    assert time.monotonic() - started < 5
