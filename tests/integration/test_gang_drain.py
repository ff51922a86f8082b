"""SIGTERM in one pod of a gang: the gang drains as a whole, and no stream notices."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

from support.gang_pods import READY, Gang, GangPod, running_gang
from tpmodel import Client

PROPAGATION = 6.0
LONG = 100
"""Tokens of a stream that goes on for seconds."""


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[Gang]:
    with running_gang(tmp_path, options=[f"--endpoint-propagation={PROPAGATION}", "--drain-timeout=200"]) as gang:
        yield gang


class Stream:
    """A client that reads one long answer."""

    def __init__(self, target: str) -> None:
        self.tokens: list[int] = []
        self.finished_at = 0.0
        self.error: Exception | None = None
        self._target = target
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            with Client(self._target) as client:
                for chunk in client.generate("Tell me", max_tokens=LONG, temperature=0, ignore_eos=True):
                    self.tokens += chunk.token_ids
        except Exception as error:  # noqa: BLE001 - told to the test
            self.error = error
        self.finished_at = time.monotonic()

    def wait(self) -> None:
        self._thread.join(220)
        assert self.error is None
        assert len(self.tokens) == LONG


def inference_health(pod: GangPod) -> bool:
    """As clients that watch health see the gang."""
    with grpc.insecure_channel(pod.target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = check(health_pb2.HealthCheckRequest(service="tpmodel.v1.InferenceService"), timeout=5)
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("index", [0, 1], ids=["leader pod", "worker pod"])
def test_sigterm_in_either_pod_drains_the_gang_and_ends_both_with_0(gang: Gang, index: int) -> None:
    leader, worker = gang.start_all()
    stream = Stream(leader.target)
    leader.eventually(lambda: stream.tokens, "the stream runs")

    begun = time.monotonic()
    gang.pods[index].process.send_signal(signal.SIGTERM)

    leader.eventually(lambda: not leader.health(READY), "the leader is not ready", seconds=PROPAGATION / 2)
    assert not inference_health(leader)
    with Client(leader.target) as late:
        answer = late.complete("One more", max_tokens=8, temperature=0, ignore_eos=True)
    assert len(answer.token_ids[0]) == 8, "it came before others could know that the gang drains"
    assert worker.health(READY), "a draining gang's worker pods change nothing"
    stream.wait()
    assert leader.wait_exit() == 0
    assert worker.wait_exit() == 0
    assert stream.finished_at - begun < 200
    asked = gang.pods[index]
    assert "tpmodel: SIGTERM: finishing running requests" in asked.output
    if index == 1:
        assert f"tpmodel: pod {worker.name} drains: finishing running requests" in leader.output
    assert [pod.termination_message for pod in gang.pods] == ["", ""]
    assert "] error: " not in leader.output


def test_sigterm_in_a_worker_pod_that_has_no_leader_ends_it_at_once_with_0(gang: Gang) -> None:
    worker = gang.start(1)
    worker.eventually(lambda: "rank 1 listens" in worker.output, "its rank is up")

    begun = time.monotonic()
    worker.process.send_signal(signal.SIGTERM)

    assert worker.wait_exit() == 0
    assert time.monotonic() - begun < 5


def test_a_gang_that_is_told_to_drain_while_it_forms_ends_with_0(gang: Gang) -> None:
    leader = gang.start(0)
    leader.eventually(lambda: "waiting for rank 1" in leader.output, "it waits")

    leader.process.send_signal(signal.SIGTERM)

    assert leader.wait_exit() == 0
