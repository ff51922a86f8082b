"""A rank on a GPU that is killed under load: its weights are mapped again, not loaded, and the streams go on.

Where there are fewer GPUs than ranks, they share: slower, by another communicator, but the same rebuild.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import torch

from support.checkpoints import make_checkpoint
from support.model_shapes import QWEN3_8B
from tpmodel import Client, Result
from tpmodel.channel import RetryPolicy
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

STREAMS = 4
NO_RETRIES = RetryPolicy(window=0)
IN_PLACE = ["--recovery", "in-place", "--log-format", "text", "--share-devices"]


@dataclass(frozen=True, slots=True)
class Size:
    """How long the streams are."""

    tokens: int
    killed_after: int
    """Chunks of each stream."""


def size_of(tp: int) -> Size:
    """Of streams at that many ranks: shorter where these share a GPU, and all they exchange takes its time."""
    return Size(tokens=400, killed_after=60) if tp <= torch.cuda.device_count() else Size(tokens=60, killed_after=10)


def gang_status(server: LocalServer) -> worker_pb2.GangStatusResponse:
    with grpc.insecure_channel(server.health_target) as channel:
        return worker_pb2_grpc.StatusServiceStub(channel).GangStatus(worker_pb2.GangStatusRequest(), timeout=10)


def rank_pids(server: LocalServer) -> dict[str, int]:
    return {entry.name: entry.pid for entry in gang_status(server).processes if entry.name.startswith("rank ")}


def prompts() -> list[list[int]]:
    return [[100 + stream + position for position in range(40)] for stream in range(STREAMS)]


class Stream(threading.Thread):
    """One greedy stream that never resumes; when each chunk came."""

    def __init__(self, target: str, prompt: list[int], tokens: int) -> None:
        super().__init__()
        self.arrivals: list[float] = []
        self.result: Result | None = None
        self._target = target
        self._prompt = prompt
        self._tokens = tokens
        self.start()

    def run(self) -> None:
        with Client(self._target, retry=NO_RETRIES) as client:
            stream = client.generate(self._prompt, max_tokens=self._tokens, temperature=0, ignore_eos=True)
            for _ in stream:
                self.arrivals.append(time.monotonic())
            self.result = stream.result()

    def tokens(self) -> tuple[int, ...]:
        self.join(120)
        assert self.result is not None
        return self.result.token_ids[0]


def kill_under_load(server: LocalServer, victim: str, size: Size) -> tuple[list[tuple[int, ...]], list[float]]:
    """The tokens of all streams, and the seconds from the kill to the next chunk of each."""
    streams = [Stream(server.target, prompt, size.tokens) for prompt in prompts()]
    deadline = time.monotonic() + 60
    while min(len(stream.arrivals) for stream in streams) < size.killed_after:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed = time.monotonic()
    os.kill(rank_pids(server)[victim], signal.SIGKILL)
    tokens = [stream.tokens() for stream in streams]
    # What was under way may still arrive after the kill: the pause is the longest gap.
    pauses = [
        max(
            later - max(earlier, killed)
            for earlier, later in zip(stream.arrivals, stream.arrivals[1:], strict=False)
            if later > killed
        )
        for stream in streams
    ]
    return tokens, pauses


def report(what: str, server: LocalServer, pauses: list[float]) -> worker_pb2.Rebuild:
    rebuild = gang_status(server).engine.last_rebuilds[-1]
    phases = ", ".join(f"{phase.name} {phase.seconds:.3f}" for phase in rebuild.phases)
    print(f"{what}: longest pause {max(pauses):.2f} s, rebuilt in {rebuild.seconds:.2f} s ({phases})")
    return rebuild


@pytest.mark.gpu
@pytest.mark.parametrize("respawn", ["fork", "spare"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_float32_streams_keep_their_tokens(tmp_path: Path, tp: int, respawn: str) -> None:
    """P17, W26; DESIGN section 9: the tokens of an undisturbed run, from weights that no file could give again."""
    checkpoint = make_checkpoint(tmp_path / "model", initializer_range=0.05)
    options = [*IN_PLACE, "--dtype", "float32", "--kv-cache-memory", "64M", "--respawn", respawn]
    with LocalServer(checkpoint, tp=tp, device="cuda", options=options) as server:
        (checkpoint / "model.safetensors").unlink()
        undisturbed = [Stream(server.target, prompt, size_of(tp).tokens).tokens() for prompt in prompts()]
        before = rank_pids(server)

        tokens, pauses = kill_under_load(server, f"rank {tp - 1}", size_of(tp))

        report(f"small, tp {tp}, {respawn}", server, pauses)
        assert tokens == undisturbed
        after = rank_pids(server)
        assert {name for name in after if after[name] != before[name]} == {f"rank {tp - 1}"}


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.parametrize("respawn", ["fork", "spare"])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_qwen3_8b_shapes_come_back_without_loading(tmp_path: Path, tp: int, respawn: str) -> None:
    """P17, W26: every stream goes on to its end; the new rank maps its arena, survivors keep process and weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_8B))
    options = [*IN_PLACE, "--load-format", "dummy", "--max-model-len", "2048", "--respawn", respawn]
    with LocalServer(folder, tp=tp, device="cuda", options=options, start_timeout=300) as server:
        before = rank_pids(server)

        tokens, pauses = kill_under_load(server, f"rank {tp - 1}", size_of(tp))

        rebuild = report(f"Qwen3-8B, tp {tp}, {respawn}", server, pauses)
        assert [len(stream) for stream in tokens] == [size_of(tp).tokens] * STREAMS
        assert rebuild.replayed_requests == STREAMS
        after = rank_pids(server)
        assert {name for name in after if after[name] != before[name]} == {f"rank {tp - 1}"}
