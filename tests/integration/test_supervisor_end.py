"""How a pod ends when it is told to, with stand-ins for its processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.supervised import Supervised, stand_in_settings


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Supervised]:
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path)))
    try:
        yield pod
    finally:
        pod.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_then_ends_with_0_and_leaves_nothing(pod: Supervised, number: signal.Signals) -> None:
    """P16: bounded, and nothing is left."""
    pod.steer(drain_seconds="0.5")
    pod.start()
    pod.wait_ready()
    descendants = pod.descendants()

    os.kill(pod.pid, number)

    assert pod.wait_exit() == 0
    (drain,), (api,), (engine,) = pod.events("drain"), pod.events("api ends"), pod.events("engine ends")
    assert drain["seconds"] == 5.0
    assert drain["time"] + 0.5 <= api["time"] <= engine["time"], "streams first, then those that carried them"
    assert psutil.wait_procs(descendants, 0)[1] == []
    assert list(pod.folder.glob("tpmodel-*")) == []
    assert pod.termination_message == ""


def test_a_draining_pod_is_not_ready(pod: Supervised) -> None:
    pod.steer(drain_seconds="1.5")
    pod.start()
    pod.wait_ready()
    os.kill(pod.pid, signal.SIGTERM)
    pod.eventually(lambda: pod.events("drain"), "a drain")

    assert not pod.health("tpmodel.v1.Ready")
    assert pod.health("")
    assert pod.wait_exit() == 0


def test_a_drain_that_does_not_end_is_cut(tmp_path: Path) -> None:
    """P16: bounded wait, then kill."""
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path), drain_timeout=0.5))
    pod.steer(drain_seconds="3600", script_of_rank_0=[["ignore_sigterm"]])
    pod.start()
    try:
        pod.wait_ready()
        descendants = pod.descendants()
        started = time.monotonic()
        os.kill(pod.pid, signal.SIGTERM)
        assert pod.wait_exit() == 0
    finally:
        pod.stop()
    assert time.monotonic() - started < 12
    assert "has not drained within" in pod.output
    assert psutil.wait_procs(descendants, 0)[1] == []


def test_a_second_ctrl_c_ends_at_once(pod: Supervised) -> None:
    pod.steer(drain_seconds="3600")
    pod.start()
    pod.wait_ready()
    descendants = pod.descendants()
    os.kill(pod.pid, signal.SIGINT)
    pod.eventually(lambda: pod.events("drain"), "a drain")
    started = time.monotonic()

    os.kill(pod.pid, signal.SIGINT)

    assert pod.wait_exit() == 130
    assert time.monotonic() - started < 2
    assert psutil.wait_procs(descendants, 0)[1] == []


def test_a_second_sigterm_changes_nothing(pod: Supervised) -> None:
    pod.steer(drain_seconds="0.7")
    pod.start()
    pod.wait_ready()
    os.kill(pod.pid, signal.SIGTERM)
    pod.eventually(lambda: pod.events("drain"), "a drain")
    os.kill(pod.pid, signal.SIGTERM)

    assert pod.wait_exit() == 0
    assert len(pod.events("drain")) == 1
    assert len(pod.events("engine ends")) == 1


def test_a_signal_before_the_world_serves_ends_without_a_drain(pod: Supervised) -> None:
    pod.steer(phase="LOADING")
    pod.start()
    pod.eventually(lambda: pod.events("register"), "a registration")

    os.kill(pod.pid, signal.SIGTERM)

    assert pod.wait_exit() == 0
    assert pod.events("drain") == []


def test_an_engine_that_crashes_while_draining_ends_the_pod_with_75(pod: Supervised) -> None:
    pod.steer(drain_seconds="3600")
    pod.start()
    pod.wait_ready()
    os.kill(pod.pid, signal.SIGTERM)
    pod.eventually(lambda: pod.events("drain"), "a drain")
    time.sleep(0.2)

    os.kill(pod.pid_of("engine"), signal.SIGKILL)

    assert pod.wait_exit() == 75


def test_orphans_of_a_process_end_with_the_pod(pod: Supervised) -> None:
    """P3: what a rank left behind is the supervisor's to end."""
    pod.steer(script_of_rank_0=[["leave_orphan"]])
    pod.start()
    pod.wait_ready()
    (event,) = pod.eventually(lambda: pod.events("orphan"), "an orphan")
    orphan = psutil.Process(event["orphan"])
    pod.eventually(lambda: orphan.ppid() == pod.pid, "the supervisor inherits it")

    os.kill(pod.pid, signal.SIGTERM)

    assert pod.wait_exit() == 0
    assert not orphan.is_running()


def test_a_port_in_use_is_refused_naming_its_option(tmp_path: Path) -> None:
    with socket.socket() as other:
        # As another server of this user would: sharing must not hide the clash.
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        pod = Supervised(tmp_path, stand_in_settings(tmp_path, port=port))
        pod.start()
        assert pod.wait_exit() == 64
    assert f"tpmodel: ended: --port {port} is in use" in pod.output
    assert pod.events("rank") == []


@pytest.mark.parametrize(
    ("changes", "explanation"),
    [
        ({"world_size": 3}, "num_attention_heads 4 is not divisible"),
        ({"world_size": 0}, "--tp 0: at least 1 rank is needed"),
        ({"max_model_len": 4096}, "max_model_len 4096 is more than the 128 positions"),
    ],
)
def test_what_cannot_work_is_refused_before_any_process_starts(
    tmp_path: Path, changes: dict[str, int], explanation: str
) -> None:
    """P2: naming the numbers."""
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, **changes))
    pod.start()

    assert pod.wait_exit() == 64
    assert explanation in pod.output
    assert pod.events("rank") == []
    assert explanation in pod.termination_message
