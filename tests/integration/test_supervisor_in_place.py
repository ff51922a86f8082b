"""Mode InPlace: what the end of a process does to a pod whose world is rebuilt, with stand-ins for its processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.supervised import Supervised, stand_in_settings


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Supervised]:
    settings = stand_in_settings(tmp_path, runtime_dir=str(tmp_path), recovery_mode="InPlace")
    pod = Supervised(tmp_path, settings)
    try:
        yield pod
    finally:
        pod.stop()


@pytest.mark.parametrize("name", ["rank 0", "rank 1"])
def test_a_rank_that_dies_while_serving_is_replaced_alone(pod: Supervised, name: str) -> None:
    """W20."""
    pod.start()
    pod.wait_ready()
    before = {process.name: process.pid for process in pod.gang_status().processes}

    os.kill(before[name], signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("register")) == 2, "a second registration")
    after = {process.name: process.pid for process in pod.gang_status().processes}
    assert after.pop(name) != before.pop(name)
    assert after == before
    assert f"{name} (pid" in pod.output


def test_many_deaths_of_a_serving_rank_are_the_engines_to_count(pod: Supervised) -> None:
    """No pause, and no end of the pod: the engine has a budget for rebuilds."""
    pod.start()
    pod.wait_ready()
    for death in range(1, 7):
        os.kill(pod.pid_of("rank 1"), signal.SIGKILL)
        pod.eventually(lambda death=death: len(pod.events("register")) == death + 1, "a registration")
    assert pod.process_status("rank 1").restarts == 6


def test_a_rank_that_dies_at_its_start_again_and_again_ends_the_pod_with_75(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    pod.steer(crashes_of_rank_1="99")

    os.kill(pod.pid_of("rank 1"), signal.SIGKILL)

    assert pod.wait_exit() == 75
    assert "rank 1 ended 5 times within 60 s" in pod.termination_message


def test_an_engine_that_dies_while_serving_is_started_again_and_registered_with(pod: Supervised) -> None:
    """DESIGN section 7: ranks keep their processes, and with them their weights."""
    pod.start()
    pod.wait_ready()
    (first,) = pod.events("register")

    os.kill(first["pid"], signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("register")) == 2, "a registration with the new engine")
    second = pod.events("register")[-1]
    assert second["pid"] != first["pid"]
    assert second["seen"] == f"engine of {first['pid']}"
    assert second["ranks"] == first["ranks"]
    pod.eventually(lambda: pod.health("tpmodel.v1.Ready"), "ready again")


def test_many_deaths_of_a_serving_engine_are_its_successors_to_count(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    for death in range(1, 7):
        os.kill(pod.pid_of("engine"), signal.SIGKILL)
        pod.eventually(lambda death=death: len(pod.events("register")) == death + 1, "a registration")
        pod.eventually(lambda: pod.health("tpmodel.v1.Ready"), "ready again")
    assert pod.process_status("engine").restarts == 6


def test_a_short_rebuild_leaves_the_pod_ready_and_an_engine_that_fails_ends_it(pod: Supervised) -> None:
    """DESIGN section 4; past the cap 75 with the cause."""
    pod.start()
    pod.wait_ready()
    pod.steer(phase="REBUILDING")
    pod.eventually(lambda: pod.gang_status().engine.phase == 4, "a rebuild")
    assert pod.health("tpmodel.v1.Ready")

    pod.steer(failure={"exit_code": 75, "cause": "10 rebuilds did not bring a stable world, last: x"})

    assert pod.wait_exit() == 75
    assert pod.termination_message == "10 rebuilds did not bring a stable world, last: x"


@pytest.mark.parametrize("mode", ["InPlace", "Restart"])
def test_a_rank_whose_configuration_cannot_work_ends_the_pod_with_64(tmp_path: Path, mode: str) -> None:
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path), recovery_mode=mode))
    pod.steer(exit_code_of_rank_0="64")
    pod.start()
    try:
        assert pod.wait_exit() == 64
    finally:
        pod.stop()
