"""A gang of two pods in mode InPlace, Gloo between them: whatever dies, the streams of its clients go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.gang_pods import Gang, GangPod, running_gang
from tpmodel import Client, Result
from tpmodel.v1 import worker_pb2

TOKENS = 60
SAMPLING = {"max_tokens": TOKENS, "temperature": 1.0, "seed": 11, "ignore_eos": True}
PROMPT = "Tell me of worlds"
IN_PLACE = ["--recovery-mode=InPlace"]


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    with running_gang(tmp_path, options=IN_PLACE) as gang:
        yield gang


class Stream:
    """A request in a thread of its own, through the client that resumes."""

    def __init__(self, target: str) -> None:
        self.result: Result | None = None
        self.begun = threading.Event()
        self._target = target
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self.begun.wait(60)

    def _run(self) -> None:
        with Client(self._target) as client:
            stream = client.generate(PROMPT, **SAMPLING)
            for count, _ in enumerate(stream):
                if count == 20:
                    self.begun.set()
            self.result = stream.result()

    def end(self) -> tuple[tuple[int, ...], ...]:
        self._thread.join(120)
        assert self.result is not None
        return self.result.token_ids


def undisturbed(target: str) -> tuple[tuple[int, ...], ...]:
    with Client(target) as client:
        return client.complete(PROMPT, **SAMPLING).token_ids


def processes(*pods: GangPod) -> dict[str, int]:
    return {process.name: process.pid for pod in pods for process in pod.gang_status().processes
            if process.name in ("engine", "rank 0", "rank 1")}  # fmt: skip


def loads(pod: GangPod) -> list[str]:
    """What the leader says of the ranks' weights, one line for each rank and epoch."""
    return [line for line in pod.output.splitlines() if "digest" in line and "KV cache of up to" in line]


@pytest.mark.in_cluster_too
@pytest.mark.parametrize("name", ["rank 1", "rank 0"])
def test_a_rank_killed_in_any_pod_is_replaced_there_and_no_pod_ends(gang: Gang, name: str) -> None:
    """P17, W26."""
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(leader, worker)
    stream = Stream(leader.target)

    os.kill(before[name], signal.SIGKILL)

    assert stream.end() == expected
    after = processes(leader, worker)
    assert after.pop(name) != before.pop(name)
    assert after == before
    assert not leader.ended
    assert not worker.ended
    assert len(loads(leader)) == 4
    assert all("mapped" in line and "(0 read)" in line for line in loads(leader)[2:])


@pytest.mark.in_cluster_too
def test_a_killed_engine_is_started_again_and_the_ranks_keep_their_weights(gang: Gang) -> None:
    """DESIGN section 7; the client resumes from the tokens that it has."""
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(leader, worker)
    epoch = leader.gang_status().engine.epoch
    stream = Stream(leader.target)

    os.kill(before["engine"], signal.SIGKILL)

    assert stream.end() == expected
    after = processes(leader, worker)
    assert after.pop("engine") != before.pop("engine")
    assert after == before
    state = leader.gang_status().engine
    assert state.epoch > epoch
    assert state.rebuilds == 1
    assert all("mapped" in line and "(0 read)" in line for line in loads(leader)[2:])


@pytest.mark.in_cluster_too
def test_survivors_wait_with_their_weights_for_the_successor_of_a_worker_pod(gang: Gang) -> None:
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(leader)
    stream = Stream(leader.target)

    worker.kill()
    leader.eventually(lambda: leader.gang_status().engine.phase == worker_pb2.PHASE_REBUILDING, "a rebuild")
    successor = gang.start(1)

    assert stream.end() == expected
    assert successor.health()
    assert processes(leader) == before
    line = next(line for line in reversed(loads(leader)) if "rank 0" in line)
    assert "mapped" in line


@pytest.mark.in_cluster_too
def test_a_worker_pod_keeps_rank_and_weights_for_the_successor_of_its_leader(gang: Gang) -> None:
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(worker)

    leader.kill()
    worker.eventually(lambda: not worker.health(), "it is not ready")
    gang.publish(leader=None)
    successor = gang.start(0)

    successor.wait_ready()
    assert undisturbed(successor.target) == expected
    assert processes(worker) == before
    line = next(line for line in loads(successor) if "rank 1" in line)
    assert "mapped" in line
    assert "(0 read)" in line


def test_rebuilds_are_counted_in_the_pods_own_folder(gang: Gang) -> None:
    """The count lies in a folder that outlives the container, not the pod."""
    leader, worker = gang.start_all()
    os.kill(leader.pid_of("rank 0"), signal.SIGKILL)
    leader.eventually(lambda: leader.health("") and leader.gang_status().engine.rebuilds == 1
                      and leader.gang_status().engine.phase == worker_pb2.PHASE_SERVING, "rebuilt")  # fmt: skip
    left = leader.gang_status().engine.rebuilds_left
    (counted,) = Path(leader._runtime.name).glob("rebuilds-*.json")
    assert f'"spent": {10 - left}' in counted.read_text()
    assert not worker.ended


@pytest.mark.in_cluster_too
def test_a_worker_pod_that_drains_leaves_alone_and_the_leader_keeps_its_weights(gang: Gang) -> None:
    """DESIGN section 4: running streams are finished first, and no other pod ends."""
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(leader)
    stream = Stream(leader.target)

    worker.process.send_signal(signal.SIGTERM)

    leader.eventually(lambda: not leader.health(), "the gang is not ready")
    assert stream.end() == expected
    assert worker.wait_exit() == 0
    successor = gang.start(1)
    leader.wait_ready()
    successor.wait_ready()
    assert undisturbed(leader.target) == expected
    assert processes(leader) == before
    state = leader.gang_status().engine
    assert state.rebuilds == 0
    assert state.last_faults[-1].kind == "pod_drained"
    line = next(line for line in reversed(loads(leader)) if "rank 0" in line)
    assert "mapped" in line


@pytest.mark.in_cluster_too
def test_a_leader_pod_that_drains_leaves_alone_and_the_worker_pod_keeps_its_weights(gang: Gang) -> None:
    """DESIGN section 4."""
    leader, worker = gang.start_all()
    expected, before = undisturbed(leader.target), processes(worker)
    stream = Stream(leader.target)

    leader.process.send_signal(signal.SIGTERM)

    assert stream.end() == expected
    assert leader.wait_exit() == 0
    gang.publish(leader=None)
    successor = gang.start(0)
    successor.wait_ready()
    assert undisturbed(successor.target) == expected
    assert processes(worker) == before
    line = next(line for line in loads(successor) if "rank 1" in line)
    assert "mapped" in line
    assert "(0 read)" in line


def test_a_gang_that_is_removed_drains_in_all_its_pods(gang: Gang) -> None:
    leader, worker = gang.start_all()
    expected = undisturbed(leader.target)
    stream = Stream(leader.target)

    for pod in (worker, leader):
        pod.process.send_signal(signal.SIGTERM)

    assert stream.end() == expected
    assert (leader.wait_exit(), worker.wait_exit()) == (0, 0)
