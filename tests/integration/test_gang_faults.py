"""What the end of a process, of a pod or of a name does to a gang of two pods, in mode Restart."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gang_pods import LEADER, Gang, running_gang
from tpmodel import Client
from tpmodel.v1 import worker_pb2


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    with running_gang(tmp_path) as gang:
        yield gang


def complete(target: str) -> int:
    with Client(target) as client:
        return len(client.complete("Tell me", max_tokens=8, temperature=0, ignore_eos=True).token_ids[0])


def test_a_rank_killed_in_a_worker_pod_ends_both_pods_with_75_and_the_cause(gang: Gang) -> None:
    leader, worker = gang.start_all()
    victim = worker.pid_of("rank 1")

    os.kill(victim, signal.SIGKILL)

    assert worker.wait_exit() == 75
    assert worker.termination_message == f"rank 1 (pid {victim}) was killed by SIGKILL while the world was serving"
    assert leader.wait_exit() == 75
    assert leader.termination_message.startswith("the serving world failed: a session has ended: rank 1: ")
    assert leader.termination_message.endswith(f"(rank 1 is in pod {worker.name})")


def test_a_pod_lost_with_all_its_processes_ends_the_leader_with_75_naming_it(gang: Gang) -> None:
    leader, worker = gang.start_all()

    worker.kill()

    assert leader.wait_exit() == 75
    assert leader.termination_message.endswith(f"(rank 1 is in pod {worker.name})")


def test_a_worker_pod_without_its_leader_waits_and_then_gives_up(gang: Gang) -> None:
    leader, worker = gang.start(0), gang.start(1, options=["--progress-deadline=25"])
    leader.wait_ready()
    worker.wait_ready()
    rank = worker.pid_of("rank 1")

    os.kill(leader.pid_of("rank 0"), signal.SIGKILL)

    assert leader.wait_exit() == 75
    assert leader.termination_message.startswith("rank 0 (pid ")
    worker.eventually(lambda: not worker.health(), "it is not ready")
    lost = time.monotonic()
    assert worker.health("")
    status = worker.gang_status()
    assert status.engine.phase == worker_pb2.PHASE_FORMING
    assert status.engine.cause == f"the leader at {LEADER} is gone"
    assert worker.pid_of("rank 1") == rank, "it keeps its ranks for the next leader"
    assert worker.wait_exit() == 75
    assert time.monotonic() - lost > 20
    message = f"no progress for 25 s: the leader of attempt 1 at {LEADER} is gone"
    assert worker.termination_message == message


def test_an_engine_killed_ends_its_pod_with_75(gang: Gang) -> None:
    leader, worker = gang.start_all()

    os.kill(leader.pid_of("engine"), signal.SIGKILL)

    assert leader.wait_exit() == 75
    assert "was killed by SIGKILL while the world was serving" in leader.termination_message
    worker.eventually(lambda: not worker.health(), "it is not ready")
    assert not worker.ended


def test_a_leader_that_comes_back_at_another_address_is_found_and_the_gang_serves_again(gang: Gang) -> None:
    """As when a container or pod is started again and no operator is there to restart the gang."""
    leader, worker = gang.start_all()
    rank = worker.pid_of("rank 1")
    leader.kill()
    worker.eventually(lambda: not worker.health(), "it is not ready")
    gang.publish(leader=None)

    successor = gang.start(0)

    assert successor.ip != leader.ip
    successor.wait_ready()
    worker.wait_ready()
    assert complete(successor.target) == 8
    assert worker.pid_of("rank 1") == rank


@pytest.mark.in_cluster_too
def test_a_worker_pod_that_comes_back_under_a_new_address_finds_a_leader_whose_name_is_unknown_for_5_s(
    gang: Gang,
) -> None:
    leader = gang.start(0, publish=False)
    gang.publish(leader=leader.ip)
    first = gang.start(1)
    first.eventually(lambda: "joined the gang" in first.output, "the first worker pod is registered")
    gang.publish(leader=None)
    first.kill()

    second = gang.start(1)
    second.eventually(lambda: "rank 1 listens" in second.output, "its rank is up")
    time.sleep(5)
    assert "joined the gang" not in second.output
    gang.publish(leader=leader.ip)

    second.eventually(lambda: "joined the gang" in second.output, "it is registered", seconds=3)
    assert second.ip != first.ip
