"""What the end of a process does to a pod, with stand-ins for its processes."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from support.ended import still_running
from support.supervised import METADATA, Supervised, stand_in_settings
from tpmodel.v1 import worker_pb2, worker_pb2_grpc


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Supervised]:
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path)))
    try:
        yield pod
    finally:
        pod.stop()


def test_nothing_outlives_a_killed_supervisor(pod: Supervised) -> None:
    """P3: ranks never outlive the parent, also when it is SIGKILLed, also when they ignore SIGTERM."""
    pod.steer(script_of_rank_1=[["ignore_sigterm"]])
    pod.start()
    pod.wait_ready()
    descendants = pod.descendants()
    assert len(descendants) == 6

    os.kill(pod.pid, signal.SIGKILL)

    assert still_running(descendants, 2) == []


def test_nothing_outlives_a_supervisor_killed_while_it_starts(pod: Supervised) -> None:
    """P3."""
    pod.start()
    pod.eventually(lambda: len(pod.descendants()) >= 3, "three processes")
    descendants = pod.descendants()

    os.kill(pod.pid, signal.SIGKILL)

    assert still_running(descendants, 2) == []
    time.sleep(0.2)
    assert [process for process in psutil.process_iter(["cmdline"]) if str(pod.folder) in str(process.info)] == []


def test_a_rank_that_dies_while_forming_is_replaced_and_registered_again(pod: Supervised) -> None:
    """W19: also when the first build failed."""
    pod.steer(phase="LOADING")
    pod.start()
    pod.eventually(lambda: pod.events("register"), "the first registration")
    first = pod.pid_of("rank 1")

    os.kill(first, signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("register")) == 2, "the second registration")
    again = pod.events("register")[-1]
    assert again["ranks"]["1"] not in (first, 0)
    assert again["seen"] == f"engine of {pod.pid_of('engine')}"
    pod.steer(phase="SERVING")
    pod.wait_ready()


def test_a_native_crash_of_a_rank_leaves_engine_and_api_alone(pod: Supervised) -> None:
    """W20: the leader's processes are the same after two crashes of a rank."""
    pod.steer(crashes_of_rank_1="2")
    pod.start()
    pod.wait_ready()

    assert "rank 1 (pid" in pod.output
    assert pod.output.count("was killed by SIGSEGV") == 2
    assert len(pod.events("rank", rank=1)) == 3
    assert len(pod.events("rank", rank=0)) == 1
    assert {process.restarts for process in pod.gang_status().processes if process.name in ("engine", "api 0")} == {0}


def test_a_rank_that_dies_again_and_again_ends_the_pod_with_75(pod: Supervised) -> None:
    pod.steer(crashes_of_rank_1="99")
    pod.start()

    assert pod.wait_exit() == 75
    assert "rank 1 ended 5 times within 60 s" in pod.output
    assert "rank 1 ended 5 times within 60 s" in pod.termination_message


def test_a_rank_that_dies_while_serving_ends_the_pod_with_75(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    descendants, victim = pod.descendants(), pod.pid_of("rank 1")

    os.kill(victim, signal.SIGKILL)

    assert pod.wait_exit() == 75
    cause = f"rank 1 (pid {victim}) was killed by SIGKILL while the world was serving"
    assert f"tpmodel: ended: {cause}" in pod.output
    assert pod.termination_message == cause
    assert psutil.wait_procs(descendants, 0)[1] == []


def test_an_engine_that_dies_while_serving_ends_the_pod_with_75(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()

    os.kill(pod.pid_of("engine"), signal.SIGKILL)

    assert pod.wait_exit() == 75
    assert "engine (pid" in pod.termination_message
    assert "was killed by SIGKILL while the world was serving" in pod.termination_message


def test_an_engine_that_dies_while_forming_is_started_again_and_registered_with(pod: Supervised) -> None:
    pod.steer(phase="LOADING")
    pod.start()
    (first,) = pod.eventually(lambda: pod.events("register"), "the first registration")

    os.kill(first["pid"], signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("register")) == 2, "a registration with the new engine")
    second = pod.events("register")[-1]
    assert second["pid"] != first["pid"]
    assert second["seen"] == f"engine of {first['pid']}"
    assert second["ranks"] == first["ranks"]


@pytest.mark.parametrize("code", [64, 75])
def test_an_engine_that_says_it_failed_decides_the_exit_code_and_the_cause(pod: Supervised, code: int) -> None:
    pod.steer(failure={"exit_code": code, "cause": "tensor w of file f is truncated"})
    pod.start()

    assert pod.wait_exit() == code
    assert pod.termination_message == "tensor w of file f is truncated"


def test_a_process_that_says_configuration_ends_the_pod_with_64(pod: Supervised) -> None:
    pod.steer(api_exit_code="64")
    pod.start()

    assert pod.wait_exit() == 64
    assert pod.termination_message == "api 0: its configuration cannot work"


def test_a_dead_api_process_is_started_again(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    first = pod.pid_of("api 0")

    os.kill(first, signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("api")) == 2, "a second api process")
    pod.eventually(lambda: pod.process_status("api 0").state == "running", "it listens")
    status = pod.process_status("api 0")
    assert (status.restarts, status.pid) == (1, pod.events("api")[-1]["pid"])
    assert pod.output.count("tpmodel: ready:") == 1


def test_the_death_of_the_fork_server_kills_no_rank_and_it_is_started_again(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    ranks = [pod.pid_of("rank 0"), pod.pid_of("rank 1")]

    os.kill(pod.pid_of("fork server"), signal.SIGKILL)

    pod.eventually(lambda: pod.process_status("fork server").restarts == 1, "a second fork server")
    assert [pod.pid_of("rank 0"), pod.pid_of("rank 1")] == ranks
    with pod.service() as stub:
        request = worker_pb2.RespawnRequest(rank=0, epoch=1)
        assert stub.Respawn(request, timeout=20, metadata=METADATA).started.pid not in (0, ranks[0])


def test_a_dead_rendezvous_is_started_again_and_registered(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()

    os.kill(pod.pid_of("rendezvous"), signal.SIGKILL)

    pod.eventually(lambda: len(pod.events("register")) == 2, "a second registration")
    assert pod.process_status("rendezvous").restarts == 1


def test_a_load_without_progress_ends_the_pod_with_75(tmp_path: Path) -> None:
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path), progress_deadline=2.0))
    pod.steer(phase="LOADING")
    pod.start()
    try:
        assert pod.wait_exit() == 75
    finally:
        pod.stop()
    # On a busy machine ranks may take longer to start than the deadline.
    assert re.fullmatch("no progress for 2 s: 0 of 0 bytes loaded, [0-2] ranks ready", pod.termination_message)


def test_a_rank_that_does_not_confirm_an_abort_in_time_is_killed(pod: Supervised) -> None:
    """P17: the deadman in the supervisor."""
    pod.steer(phase="LOADING", script_of_rank_1=[["abort_started", 7, 0.5]])
    pod.start()
    pod.eventually(lambda: "rank 1 has not left epoch 7 within 0.5 s: killing it" in pod.output, "the deadman")
    pod.steer(script_of_rank_1=None)
    pod.eventually(lambda: len(pod.events("rank", rank=1)) == 2, "a new rank 1")
    assert len(pod.events("rank", rank=0)) == 1


def test_a_rank_that_confirms_an_abort_in_time_lives(pod: Supervised) -> None:
    """P17."""
    pod.steer(script_of_rank_1=[["abort_started", 7, 0.3], ["abort_done", 7]])
    pod.start()
    pod.wait_ready()
    time.sleep(0.6)
    assert "has not left epoch" not in pod.output
    assert len(pod.events("rank", rank=1)) == 1


def test_the_memory_of_a_killed_rank_is_found_by_its_successor(pod: Supervised) -> None:
    """The descriptor that the supervisor holds keeps the content through the SIGKILL of its maker."""
    pod.steer(phase="LOADING", script_of_rank_1=[["remember", "what weights say"]])
    pod.start()
    pod.eventually(lambda: pod.events("stored"), "an arena in the supervisor's hands")
    with pod.service() as stub:
        status = stub.GetSupervisorStatus(worker_pb2.GetSupervisorStatusRequest(), timeout=5, metadata=METADATA)
    assert [(arena.id.rank, arena.id.kind, arena.bytes) for arena in status.arenas] == [(1, "weights", 4096)]

    os.kill(pod.pid_of("rank 1"), signal.SIGKILL)

    (found,) = pod.eventually(lambda: pod.events("found"), "the arena in the hands of the next rank")
    assert (found["rank"], found["text"], found["model"]) == (1, "what weights say", "a model")


def test_released_memory_is_gone(pod: Supervised) -> None:
    pod.steer(script_of_rank_1=[["remember", "x"]])
    pod.start()
    pod.wait_ready()
    arena = worker_pb2.ArenaId(rank=1, kind="weights", number=0)
    with pod.service() as stub:
        sizes = [
            stub.ReleaseMemory(worker_pb2.ReleaseMemoryRequest(arena=arena), timeout=5, metadata=METADATA).bytes
            for _ in range(2)
        ]
    assert sizes == [4096, 0]


def test_respawn_replaces_a_live_rank_and_is_no_fault(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    first = pod.pid_of("rank 1")
    with pod.service() as stub:
        events = stub.Watch(worker_pb2.WatchRequest(), timeout=30, metadata=METADATA)
        next(events)
        next(events)
        request = worker_pb2.RespawnRequest(rank=1, epoch=5)
        started = stub.Respawn(request, timeout=20, metadata=METADATA).started
        exited, seen = next(events).exited, next(events).started

    assert (exited.rank, exited.pid, exited.signal) == (1, first, signal.SIGKILL)
    assert list(exited.last_stderr_lines) == ["rank 1 speaks on stderr"]
    assert (seen.rank, seen.pid, seen.port) == (started.rank, started.pid, started.port)
    assert started.pid != first
    assert not psutil.pid_exists(first)
    pod.eventually(lambda: pod.events("register")[-1]["ranks"]["1"] == started.pid, "a registration with the new one")


def test_a_watch_outlives_its_watchers_keepalive(pod: Supervised) -> None:
    """W27: by default gRPC's servers end connections whose keepalive asks this often."""
    pod.start()
    pod.wait_ready()
    port = pod.eventually(lambda: pod.events("register"), "a registration")[-1]["supervisor_port"]
    options = [("grpc.keepalive_time_ms", 1100), ("grpc.http2.max_pings_without_data", 0)]
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        stub = worker_pb2_grpc.SupervisorServiceStub(channel)
        events = stub.Watch(worker_pb2.WatchRequest(), timeout=8, metadata=METADATA)
        with pytest.raises(grpc.RpcError) as error:
            list(events)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # pyright: ignore[reportAttributeAccessIssue]


def test_respawn_refuses_older_epochs_and_unknown_ranks(pod: Supervised) -> None:
    """W25: a message of an older epoch is refused."""
    pod.start()
    pod.wait_ready()
    with pod.service() as stub:
        stub.Respawn(worker_pb2.RespawnRequest(rank=1, epoch=5), timeout=20, metadata=METADATA)
        for request, code in (
            (worker_pb2.RespawnRequest(rank=1, epoch=4), grpc.StatusCode.FAILED_PRECONDITION),
            (worker_pb2.RespawnRequest(rank=2, epoch=6), grpc.StatusCode.NOT_FOUND),
            (worker_pb2.RespawnRequest(rank=2**32 - 1, epoch=6), grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.RpcError) as error:
                stub.Respawn(request, timeout=20, metadata=METADATA)
            assert error.value.code() is code  # pyright: ignore[reportAttributeAccessIssue]


def test_kill_spares_a_rank_whose_pid_is_another(pod: Supervised) -> None:
    pod.start()
    pod.wait_ready()
    pid = pod.pid_of("rank 0")
    with pod.service() as stub:
        spared = stub.Kill(worker_pb2.KillRequest(rank=0, pid=pid + 1), timeout=5, metadata=METADATA)
        assert not spared.killed
        assert psutil.pid_exists(pid)
        assert stub.Kill(worker_pb2.KillRequest(rank=0, pid=pid), timeout=5, metadata=METADATA).killed
    assert pod.wait_exit() == 75
