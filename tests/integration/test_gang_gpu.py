"""A gang of two pods with one GPU each, through NCCL."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.gang_pods import MODEL, running_gang
from tpmodel import Client
from tpmodel.local import LocalServer

pytestmark = pytest.mark.gpu

PROMPTS = ["Tell me", "Once upon a time there was", "1 2 3 4"]


def tokens(target: str) -> list[tuple[int, ...]]:
    with Client(target) as client:
        completions = [client.complete(text, max_tokens=24, temperature=0, ignore_eos=True) for text in PROMPTS]
    return [tuple(completion.token_ids[0]) for completion in completions]


def test_two_pods_of_one_gpu_give_the_tokens_that_one_pod_of_two_gives_and_listen_on_their_interface_only(
    tmp_path: Path,
) -> None:
    with running_gang(tmp_path, device="cuda") as gang:
        leader, worker = gang.start_all()
        here = tokens(leader.target)
        assert {rank.communicator for rank in leader.gang_status().engine.ranks} == {"nccl"}
        for pod in (leader, worker):
            processes = [pod.process, *pod.process.children(recursive=True)]
            connections = [entry for process in processes for entry in process.net_connections("tcp")]
            listening = {entry.laddr.ip.removeprefix("::ffff:") for entry in connections if entry.status == "LISTEN"}
            # NCCL listens at the interface's first address.
            assert listening <= {pod.ip, "127.0.0.1"}
    options = ["--dtype", "float32", "--kv-cache-memory", "8M", "--log-format", "text"]
    with LocalServer(MODEL, tp=2, device="cuda", options=options) as server:
        there = tokens(server.target)
    assert here == there
