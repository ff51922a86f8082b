"""A gang of two pods, real processes and real Gloo between them, beside one pod with the same ranks."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest

from support.gang_pods import MODEL, Gang, running_gang
from tpmodel import Client
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2

PROMPTS = ["Tell me", "Once upon a time there was", "1 2 3 4"]


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    with running_gang(tmp_path_factory.mktemp("gang")) as gang:
        gang.start_all()
        yield gang


def tokens(target: str) -> list[tuple[int, ...]]:
    with Client(target) as client:
        completions = [client.complete(text, max_tokens=24, temperature=0, ignore_eos=True) for text in PROMPTS]
    return [tuple(completion.token_ids[0]) for completion in completions]


def test_two_pods_give_the_tokens_that_one_pod_gives(gang: Gang) -> None:
    here = tokens(gang.pods[0].target)
    options = ["--dtype", "float32", "--kv-cache-memory", "8M", "--log-format", "text"]
    with LocalServer(MODEL, tp=2, device="cpu", options=options) as server:
        there = tokens(server.target)
    assert here == there
    assert [len(completion) for completion in here] == [24, 24, 24]


def test_every_pod_says_what_the_gang_does(gang: Gang) -> None:
    leader, worker = gang.pods
    for pod in (leader, worker):
        pod.eventually(lambda pod=pod: pod.gang_status().engine.phase == worker_pb2.PHASE_SERVING, "it serves")
        status = pod.gang_status()
        assert status.pod == pod.uid
        assert status.attempt == 1
        assert [rank.pod for rank in status.engine.ranks] == [leader.uid, worker.uid]
        assert {rank.communicator for rank in status.engine.ranks} == {"gloo"}
        assert pod.health("")


def test_a_worker_pod_has_ranks_and_nothing_that_faces_clients(gang: Gang) -> None:
    leader, worker = gang.pods
    names = {process.name for process in worker.gang_status().processes}
    assert names == {"fork server", "rank 1"}
    names = {process.name for process in leader.gang_status().processes}
    assert names == {"fork server", "rendezvous", "rank 0", "engine", "api 0"}
    assert f"tpmodel: joined the gang: rank 1 of 2, leader {leader.ip}" in worker.output


def test_everything_listens_at_its_pods_address_only(gang: Gang) -> None:
    """Gloo, the rendezvous store and the ranks ask for no token, or for one that the pod's network sees."""
    for pod in gang.pods:
        processes = [pod.process, *pod.process.children(recursive=True)]
        listening = [
            connection.laddr
            for process in processes
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert listening
        assert {address.ip.removeprefix("::ffff:") for address in listening} == {pod.ip}
