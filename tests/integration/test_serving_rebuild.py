"""Ranks of a whole server that die or hang under load: the streams go on, with the tokens that they would have had."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2

from support.checkpoints import make_checkpoint
from tpmodel import Client, Result
from tpmodel.channel import RetryPolicy
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

STEP_DEADLINE = 3
OPTIONS = [
    *("--dtype", "float32", "--kv-cache-memory", "8M", "--log-format", "text"),
    *("--recovery", "in-place", "--rebuild-limit", "50", "--step-deadline", str(STEP_DEADLINE)),
]
NO_RETRIES = RetryPolicy(window=0)
PATIENCE = RetryPolicy(window=60.0, first_delay=0.05, longest_delay=0.5)
PROMPT = list(range(10, 40))
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"max_tokens": 300, "temperature": 0.0, "ignore_eos": True},
    "seeded": {"max_tokens": 300, "temperature": 1.0, "seed": 3, "ignore_eos": True},
    "samples and logprobs": {"max_tokens": 200, "temperature": 0.8, "seed": 5, "n": 2, "logprobs": 3},
    "penalties": {
        "max_tokens": 300,
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": 8,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 150,
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalServer]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("rebuild"), initializer_range=0.05)
    with LocalServer(checkpoint, tp=2, device="cpu", options=OPTIONS) as server:
        # Whoever wanted to read weights again could not.
        (checkpoint / "model.safetensors").unlink()
        yield server


@pytest.fixture(scope="module")
def undisturbed(server: LocalServer) -> dict[str, Result]:
    with Client(server.target) as client:
        return {name: client.complete(PROMPT, **sampling) for name, sampling in REQUESTS.items()}


def gang_status(server: LocalServer) -> worker_pb2.GangStatusResponse:
    with grpc.insecure_channel(server.health_target) as channel:
        return worker_pb2_grpc.StatusServiceStub(channel).GangStatus(worker_pb2.GangStatusRequest(), timeout=10)


def pids(server: LocalServer) -> dict[str, int]:
    return {process.name: process.pid for process in gang_status(server).processes if process.state != "exited"}


class Streams:
    """One stream of each request, read through one connection each that never resumes."""

    def __init__(self, target: str) -> None:
        self.results: dict[str, Result] = {}
        self.chunks = dict.fromkeys(REQUESTS, 0)
        self._target = target
        self._threads = [threading.Thread(target=self._run, args=(name,)) for name in REQUESTS]
        for thread in self._threads:
            thread.start()

    def _run(self, name: str) -> None:
        with Client(self._target, retry=NO_RETRIES) as client:
            stream = client.generate(PROMPT, **REQUESTS[name])
            for _ in stream:
                self.chunks[name] += 1
            self.results[name] = stream.result()

    def wait_until_all_run(self) -> None:
        deadline = time.monotonic() + 30
        while min(self.chunks.values()) < 10:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> dict[str, Result]:
        for thread in self._threads:
            thread.join(90)
        assert not any(thread.is_alive() for thread in self._threads)
        return self.results


def assert_same(results: dict[str, Result], expected: dict[str, Result]) -> None:
    """Token for token, and what comes with them."""
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert result.token_ids == expected[name].token_ids, name
        assert result.texts == expected[name].texts, name
        assert result.completion.samples == expected[name].completion.samples, name
        for sample, entries in enumerate(result.logprobs):
            wanted = [entry.logprob for entry in expected[name].logprobs[sample]]
            assert [entry.logprob for entry in entries] == pytest.approx(wanted, abs=1e-4), name


def connections_of_engine(server: LocalServer) -> Counter[tuple[str, int]]:
    """How many it has to each address."""
    connections = psutil.Process(pids(server)["engine"]).net_connections("tcp")
    return Counter(
        (connection.raddr.ip, connection.raddr.port)
        for connection in connections
        if connection.raddr and connection.status == psutil.CONN_ESTABLISHED
    )


def test_the_engine_keeps_no_connection_of_a_lost_world(server: LocalServer, undisturbed: dict[str, Result]) -> None:
    """W21: two worlds after its first one it has one connection to each of what it talks to."""
    before = connections_of_engine(server)
    for _ in range(2):
        os.kill(pids(server)["rank 1"], signal.SIGKILL)
        with Client(server.target) as client:
            result = client.complete(PROMPT, **REQUESTS["greedy"])
        assert result.token_ids == undisturbed["greedy"].token_ids
    deadline = time.monotonic() + 10
    while (after := connections_of_engine(server)).total() > before.total():
        assert time.monotonic() < deadline, (before, after)
        time.sleep(0.05)
    assert set(after.values()) == {1}


@pytest.mark.parametrize("victim", ["rank 1", "rank 0"])
def test_streams_go_on_after_a_rank_was_killed(
    server: LocalServer, undisturbed: dict[str, Result], victim: str
) -> None:
    """P17, W20, W26; DESIGN section 9: nothing streamed is repeated, lost or changed."""
    before, epoch = pids(server), gang_status(server).engine.epoch
    streams = Streams(server.target)
    streams.wait_until_all_run()

    os.kill(before[victim], signal.SIGKILL)

    assert_same(streams.end(), undisturbed)
    after, state = pids(server), gang_status(server).engine
    assert after.pop(victim) != before.pop(victim)
    assert after == before
    assert state.epoch > epoch
    assert state.last_faults[-1].kind == "rank_exited"
    assert f"{victim}: its process (pid" in state.last_faults[-1].message
    rebuild = state.last_rebuilds[-1]
    assert (rebuild.epoch, rebuild.replayed_requests) == (state.epoch, len(REQUESTS))


def test_streams_go_on_after_a_rank_was_stopped(server: LocalServer, undisturbed: dict[str, Result]) -> None:
    """P17: the step deadline finds it, Abort is not confirmed, and the supervisor replaces it."""
    before = pids(server)
    streams = Streams(server.target)
    streams.wait_until_all_run()

    os.kill(before["rank 1"], signal.SIGSTOP)

    assert_same(streams.end(), undisturbed)
    after = pids(server)
    assert after.pop("rank 1") != before.pop("rank 1")
    assert after == before
    assert gang_status(server).engine.last_faults[-1].kind == "step_deadline"


def test_clients_health_flips_and_comes_back_while_readiness_stays(server: LocalServer) -> None:
    """DESIGN section 4: readiness goes only when a rebuild lasts over 10 s."""
    health = health_pb2.HealthCheckResponse
    with grpc.insecure_channel(server.target) as inference, grpc.insecure_channel(server.health_target) as probes:
        watch = inference.unary_stream(
            "/grpc.health.v1.Health/Watch",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health.FromString,
        )(health_pb2.HealthCheckRequest(service="tpmodel.v1.InferenceService"), timeout=60)
        check = probes.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health.FromString,
        )
        assert next(watch).status == health.SERVING
        killed = time.monotonic()

        os.kill(pids(server)["rank 0"], signal.SIGKILL)

        assert next(watch).status == health.NOT_SERVING
        assert time.monotonic() - killed < 1
        assert check(health_pb2.HealthCheckRequest(service="tpmodel.v1.Ready"), timeout=5).status == health.SERVING
        assert next(watch).status == health.SERVING


def test_a_request_that_comes_while_rebuilding_waits_and_is_served(
    server: LocalServer, undisturbed: dict[str, Result]
) -> None:
    """W22."""
    os.kill(pids(server)["rank 1"], signal.SIGKILL)
    with Client(server.target, retry=NO_RETRIES) as client:
        result = client.complete(PROMPT, **REQUESTS["seeded"])
    assert result.token_ids == undisturbed["seeded"].token_ids


def test_a_client_that_goes_while_rebuilding_leaves_nothing(server: LocalServer) -> None:
    """P14."""
    with Client(server.target) as client:
        stream = client.generate(PROMPT, max_tokens=900, ignore_eos=True)
        next(iter(stream))
        os.kill(pids(server)["rank 1"], signal.SIGKILL)
        stream.cancel()
    deadline = time.monotonic() + 20
    while (state := gang_status(server).engine).phase != worker_pb2.PHASE_SERVING or state.running:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (state.waiting, state.kv_blocks_used) == (0, 0)


def test_tpmodel_rebuild_asks_for_a_new_world_with_the_same_processes(
    server: LocalServer, undisturbed: dict[str, Result]
) -> None:
    """W26."""
    before, epoch = pids(server), gang_status(server).engine.epoch
    (control,) = (port for flag, port in itertools.pairwise(server._ports) if flag == "--control-port")
    streams = Streams(server.target)
    streams.wait_until_all_run()

    command = [sys.executable, "-m", "tpmodel", "rebuild", "--target", f"127.0.0.1:{control}"]
    asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert (asked.returncode, asked.stderr) == (0, "")
    assert asked.stdout.startswith(f"serving at epoch {epoch + 1} after ")
    assert_same(streams.end(), undisturbed)
    assert pids(server) == before


class Reader(threading.Thread):
    """Reads one stream, which resumes where it breaks."""

    def __init__(self, target: str, options: dict[str, Any]) -> None:
        super().__init__()
        self.progress: list[tuple[int, int]] = []
        """Tokens and characters so far, after each chunk."""
        self.result: Result | None = None
        self._target = target
        self._options = options
        self.start()

    def run(self) -> None:
        tokens = characters = 0
        with Client(self._target, retry=PATIENCE) as client:
            stream = client.generate(PROMPT, **self._options)
            for chunk in stream:
                tokens += len(chunk.token_ids)
                characters += len(chunk.text)
                self.progress.append((tokens, characters))
            self.result = stream.result()

    def whole(self) -> Result:
        self.join(90)
        assert self.result is not None
        return self.result


LONGEST_STOP = 256
"""Characters."""


@pytest.mark.parametrize("victim", ["rank 1", "api 0"])
def test_a_stop_string_that_straddles_a_rebuild_is_found(server: LocalServer, victim: str) -> None:
    """DESIGN section 9: half of it was computed in one world, the other half in the next, or by another process."""
    options = REQUESTS["seeded"]
    undisturbed = Reader(server.target, options)
    text = undisturbed.whole().texts[0]
    begin = next(place for place in undisturbed.progress if place[0] >= options["max_tokens"] // 3)
    stop = text[begin[1] : begin[1] + LONGEST_STOP]
    assert text.find(stop) == begin[1]
    end = next(tokens for tokens, characters in undisturbed.progress if characters >= begin[1] + len(stop))
    for _ in range(10):
        # Both go step by step in one batch, so the one without the stop string tells how far the other is.
        beside, stopped = Reader(server.target, options), Reader(server.target, options | {"stop": [stop]})
        pid = pids(server)[victim]
        while beside.is_alive() and (not beside.progress or beside.progress[-1][0] < (begin[0] + end) // 2):
            time.sleep(0.0005)
        straddles = stopped.is_alive()
        os.kill(pid, signal.SIGKILL)
        assert beside.whole().texts == (text,)
        result = stopped.whole()
        assert result.texts == (text[: begin[1]],)
        assert result.completion.samples[0].finish_reason == "stop"
        if straddles:
            return
    raise AssertionError("the stream with the stop string has always ended before the kill")


def arena_file(server: LocalServer, rank: int) -> Path:
    """The memory of a rank's weights, as the supervisor holds it."""
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    return next(path for path in descriptors.iterdir() if f"weights arena 0 of rank {rank} " in str(path.readlink()))


def test_weights_that_were_changed_are_never_used_again(tmp_path: Path) -> None:
    """DESIGN section 6: the digest is checked; the rank loads from the files instead, and the tokens are right."""
    checkpoint = make_checkpoint(tmp_path, initializer_range=0.05)
    with LocalServer(checkpoint, tp=2, device="cpu", options=OPTIONS) as server:
        with Client(server.target) as client:
            expected = client.complete(PROMPT, **REQUESTS["seeded"]).token_ids
        victim = pids(server)["rank 1"]
        os.kill(victim, signal.SIGSTOP)
        with arena_file(server, 1).open("r+b") as memory:
            memory.seek(4096)
            memory.write(b"\x7f" * 64)
        os.kill(victim, signal.SIGKILL)

        with Client(server.target) as client:
            assert client.complete(PROMPT, **REQUESTS["seeded"]).token_ids == expected
        assert "is not mapped again, loading anew: tensor" in server.output
        last = [line for line in server.output.splitlines() if "rank 1 loaded" in line][-1]
        assert "(0 read)" not in last
