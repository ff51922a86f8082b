"""The ways to a new rank process beside the fork server: a spare that is promoted, and a new interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from support.ended import still_running
from support.supervised import METADATA, Supervised, stand_in_settings
from tpmodel.v1 import worker_pb2

MakePod = Callable[[str], Supervised]
# Fork server, engine, api, rendezvous, two ranks and the spare.
WITH_SPARE = 7
# All of them but fork server and spare.
COLD = 5


@pytest.fixture
def make_pod(tmp_path: Path) -> Iterator[MakePod]:
    pods: list[Supervised] = []

    def make(respawn: str) -> Supervised:
        settings = stand_in_settings(tmp_path, runtime_dir=str(tmp_path), respawn=respawn)
        pods.append(Supervised(tmp_path, settings))
        return pods[-1]

    yield make
    for pod in pods:
        pod.stop()


@pytest.fixture
def pod(make_pod: MakePod) -> Supervised:
    pod = make_pod("spare")
    pod.steer(spare_bytes="1610612736")
    pod.start()
    pod.wait_ready()
    return pod


def spare(pod: Supervised, *, other_than: int = 0) -> int:
    """The pid of the spare, once one is ready."""

    def ready() -> int | None:
        found = [process for process in pod.gang_status().processes if process.name == "spare"]
        return found[0].pid if found and found[0].state == "running" and found[0].pid != other_than else None

    return pod.eventually(ready, "a spare") or 0


def respawn(pod: Supervised, rank: int, epoch: int) -> int:
    """The new pid."""
    with pod.service() as stub:
        request = worker_pb2.RespawnRequest(rank=rank, epoch=epoch)
        return stub.Respawn(request, timeout=20, metadata=METADATA).started.pid


def test_a_spare_waits_beside_the_ranks_without_grpc(pod: Supervised) -> None:
    pid = spare(pod)
    (event,) = pod.events("spare")
    assert (event["pid"], event["parent"], event["grpc"]) == (pid, pod.pid, False)
    assert len(pod.descendants()) == WITH_SPARE
    # The ranks' own start comes first.
    assert event["time"] > max(event["time"] for event in pod.events("rank"))


def test_a_spare_and_its_device_memory_are_shown(pod: Supervised) -> None:
    pid = spare(pod)

    with pod.service() as stub:
        status = stub.GetSupervisorStatus(worker_pb2.GetSupervisorStatusRequest(), timeout=5, metadata=METADATA)
        events = stub.Watch(worker_pb2.WatchRequest(), timeout=30, metadata=METADATA)
        ready = next(event.spare_ready for event in events if event.WhichOneof("event") == "spare_ready")
    command = [sys.executable, "-m", "tpmodel", "status", "--target", f"127.0.0.1:{pod.port_setting('health_port')}"]
    printed = subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout

    assert [(p.pid, p.device_bytes) for p in status.processes if p.name == "spare"] == [(pid, 1610612736)]
    assert (ready.pid, ready.device_bytes) == (pid, 1610612736)
    assert f"spare (pid {pid}): holds 1536 MiB of device memory" in printed


def test_a_respawned_rank_is_the_spare_and_another_spare_is_made(pod: Supervised) -> None:
    waiting, first = spare(pod), pod.pid_of("rank 1")

    assert respawn(pod, 1, epoch=5) == waiting

    assert not psutil.pid_exists(first)
    status = pod.process_status("rank 1")
    assert (status.pid, status.state, status.restarts, status.device_bytes) == (waiting, "running", 1, 0)
    pod.eventually(lambda: pod.events("register")[-1]["ranks"]["1"] == waiting, "the engine knows it")
    assert pod.output.count("[rank 1] rank 1 speaks on stderr") == 2
    assert spare(pod) not in (waiting, first)


def test_the_end_of_a_promoted_spare_is_the_ranks(pod: Supervised) -> None:
    promoted = spare(pod)
    respawn(pod, 1, epoch=5)

    os.kill(promoted, signal.SIGKILL)

    assert pod.wait_exit() == 75
    assert f"rank 1 (pid {promoted}) was killed by SIGKILL" in pod.termination_message


def test_a_dead_spare_is_replaced_and_no_fault(pod: Supervised) -> None:
    first = spare(pod)
    ranks = [pod.pid_of("rank 0"), pod.pid_of("rank 1")]

    os.kill(first, signal.SIGKILL)

    assert spare(pod, other_than=first) != first
    assert [pod.pid_of("rank 0"), pod.pid_of("rank 1")] == ranks
    assert pod.health("tpmodel.v1.Ready")


def test_a_spare_that_crashes_again_and_again_does_not_end_the_pod(make_pod: MakePod) -> None:
    pod = make_pod("spare")
    pod.steer(crashes_of_spare="6")
    pod.start()
    pod.wait_ready()

    spare(pod)
    assert pod.output.count("spare (pid") >= 6
    assert pod.health("tpmodel.v1.Ready")


def test_a_rank_is_replaced_though_its_spare_has_just_died(pod: Supervised) -> None:
    """Stopped, so that the supervisor still takes it for ready; killed, once it is the rank."""
    waiting, first = spare(pod), pod.pid_of("rank 1")
    os.kill(waiting, signal.SIGSTOP)

    with pod.service() as stub:
        request = worker_pb2.RespawnRequest(rank=1, epoch=5)
        answer = stub.Respawn.future(request, timeout=20, metadata=METADATA)
        pod.eventually(lambda: pod.pid_of("rank 1") == waiting, "the promotion")
        os.kill(waiting, signal.SIGKILL)
        started = answer.result().started

    assert started.pid not in (waiting, first)
    assert pod.pid_of("rank 1") == started.pid
    assert pod.health("tpmodel.v1.Ready")


def test_without_a_spare_that_is_ready_the_fork_server_is_asked(make_pod: MakePod) -> None:
    pod = make_pod("spare")
    pod.steer(crashes_of_spare="99")
    pod.start()
    pod.wait_ready()
    first = pod.pid_of("rank 0")

    assert respawn(pod, 0, epoch=1) not in (0, first)


def test_the_death_of_the_fork_server_leaves_the_spare_alone(pod: Supervised) -> None:
    waiting = spare(pod)

    os.kill(pod.pid_of("fork server"), signal.SIGKILL)

    pod.eventually(lambda: pod.process_status("fork server").restarts == 1, "a second fork server")
    assert respawn(pod, 1, epoch=5) == waiting


def test_neither_spare_nor_its_promise_outlives_a_killed_supervisor(pod: Supervised) -> None:
    """P3."""
    spare(pod)
    descendants = pod.descendants()
    assert len(descendants) == WITH_SPARE

    os.kill(pod.pid, signal.SIGKILL)

    assert still_running(descendants, 2) == []


def test_a_drain_ends_the_spare_too(pod: Supervised) -> None:
    spare(pod)
    descendants = pod.descendants()

    os.kill(pod.pid, signal.SIGTERM)

    assert pod.wait_exit() == 0
    assert psutil.wait_procs(descendants, 0)[1] == []


def test_cold_has_no_fork_server_and_executes_every_rank(make_pod: MakePod) -> None:
    pod = make_pod("cold")
    pod.start()
    pod.wait_ready()
    first = pod.pid_of("rank 1")
    assert len(pod.descendants()) == COLD
    assert "fork server" not in [process.name for process in pod.gang_status().processes]

    second = respawn(pod, 1, epoch=5)

    assert second != first
    command = psutil.Process(second).cmdline()
    assert "tpmodel_worker.supervisor.cold_start" in command
    assert not any(pod.settings.token in argument for argument in command)
    assert [event["parent"] for event in pod.events("rank")] == [pod.pid] * 3


def test_nothing_outlives_a_killed_supervisor_of_cold_ranks(make_pod: MakePod) -> None:
    """P3: also when they ignore SIGTERM."""
    pod = make_pod("cold")
    pod.steer(script_of_rank_1=[["ignore_sigterm"]])
    pod.start()
    pod.wait_ready()
    descendants = pod.descendants()

    os.kill(pod.pid, signal.SIGKILL)

    assert still_running(descendants, 2) == []


def test_cold_ranks_keep_their_exit_code_and_last_lines(make_pod: MakePod) -> None:
    pod = make_pod("cold")
    pod.steer(exit_code_of_rank_1="64")
    pod.start()

    assert pod.wait_exit() == 64
    assert pod.termination_message == "rank 1: rank 1 speaks on stderr"
