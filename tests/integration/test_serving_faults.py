"""What ends or restarts processes of one whole server in mode Restart: nothing is left, the cause is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from support.checkpoints import make_checkpoint
from support.ended import still_running
from support.waiting import until
from tpmodel import Client, Result, TpmodelError
from tpmodel.local import LocalServer, free_ports
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

OPTIONS = ["--dtype", "float32", "--kv-cache-memory", "4M", "--log-format", "text", "--recovery", "restart"]
PROMPT = list(range(10, 40))
SAMPLING = {"temperature": 1.0, "seed": 3, "ignore_eos": True}
WHOLE_CONTEXT = 900
# Supervisor's children: fork server, engine, api, rendezvous, two ranks.
PROCESSES = 6


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("faults"), initializer_range=0.05)


@pytest.fixture
def server(checkpoint: Path) -> Iterator[LocalServer]:
    with LocalServer(checkpoint, tp=2, device="cpu", options=OPTIONS) as server:
        yield server


def pids(server: LocalServer) -> dict[str, int]:
    with grpc.insecure_channel(server.health_target) as channel:
        stub = worker_pb2_grpc.StatusServiceStub(channel)
        status = stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10)
    return {process.name: process.pid for process in status.processes if process.state != "exited"}


def descendants(server: LocalServer) -> list[psutil.Process]:
    found = psutil.Process(server.process.pid).children(recursive=True)
    assert len(found) == PROCESSES, found
    return found


class Streaming:
    """A request that is under way in a thread of its own, long enough for what is done to the server meanwhile."""

    def __init__(self, target: str, *, max_tokens: int = WHOLE_CONTEXT) -> None:
        self.chunks = 0
        self.result: Result | None = None
        self.error: TpmodelError | None = None
        self._target = target
        self._max_tokens = max_tokens
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._begun.wait(30)

    def _run(self) -> None:
        with Client(self._target) as client:
            try:
                stream = client.generate(PROMPT, max_tokens=self._max_tokens, **SAMPLING)
                for _ in stream:
                    self.chunks += 1
                    self._begun.set()
                self.result = stream.result()
            except TpmodelError as error:
                self.error = error
            finally:
                self._begun.set()

    def end(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


def test_a_killed_api_process_is_started_again_and_the_client_resumes(server: LocalServer) -> None:
    """No token that was streamed is repeated, lost or changed."""
    with Client(server.target) as client:
        whole = client.complete(PROMPT, max_tokens=WHOLE_CONTEXT, **SAMPLING).token_ids
    streaming = Streaming(server.target)
    before = pids(server)

    os.kill(before["api 0"], signal.SIGKILL)

    assert streaming.result is None, "it was over before"
    streaming.end()
    assert streaming.error is None
    assert streaming.result is not None
    assert streaming.result.token_ids == whole
    after = pids(server)
    assert after.pop("api 0") != before.pop("api 0")
    assert after == before


@pytest.mark.parametrize("name", ["rank 1", "rank 0", "engine"])
def test_the_death_of_a_serving_process_ends_the_server_with_75_and_its_cause(server: LocalServer, name: str) -> None:
    family, victim = descendants(server), pids(server)[name]
    started = time.monotonic()

    os.kill(victim, signal.SIGKILL)

    assert server.wait(20) == 75
    assert time.monotonic() - started < 8
    assert f"tpmodel: ended: {name} (pid {victim}) was killed by SIGKILL while the world was serving" in server.output
    assert psutil.wait_procs(family, 0)[1] == []


def test_a_rank_that_is_stopped_while_idle_ends_the_server_with_75(server: LocalServer) -> None:
    """P17: with no step under way the keepalive of its session finds it, in 15 s."""
    family, victim = descendants(server), pids(server)["rank 1"]
    started = time.monotonic()

    os.kill(victim, signal.SIGSTOP)

    assert server.wait(30) == 75
    assert 5 < time.monotonic() - started < 25
    assert "tpmodel: ended: " in server.output
    assert "rank 1" in server.output.splitlines()[-1]
    assert psutil.wait_procs(family, 0)[1] == []


def test_nothing_outlives_a_killed_supervisor(server: LocalServer) -> None:
    """P3: engine, api, ranks, fork server and rendezvous, in the middle of a request."""
    family = descendants(server)
    streaming = Streaming(server.target)

    server.process.kill()

    assert still_running(family, 3) == []
    server.wait(5)
    assert streaming.result is None


def test_sigterm_lets_a_running_stream_finish(server: LocalServer) -> None:
    streaming = Streaming(server.target)
    family = descendants(server)

    server.process.send_signal(signal.SIGTERM)

    assert server.wait(60) == 0
    streaming.end()
    assert streaming.result is not None
    assert len(streaming.result.token_ids[0]) == WHOLE_CONTEXT
    assert psutil.wait_procs(family, 0)[1] == []


def test_a_second_ctrl_c_ends_at_once(server: LocalServer) -> None:
    """P16."""
    streaming = Streaming(server.target)
    family = descendants(server)
    server.process.send_signal(signal.SIGINT)
    until(lambda: "finishing running requests" in server.output, "the drain has begun")
    started = time.monotonic()

    server.process.send_signal(signal.SIGINT)

    assert server.wait(20) == 130
    assert time.monotonic() - started < 3
    assert psutil.wait_procs(family, 0)[1] == []
    assert streaming.result is None


def test_a_reader_of_the_output_that_goes_away_does_not_end_the_server(checkpoint: Path) -> None:
    """As `tpmodel serve ... 2>&1 | head -n 1` does."""
    port, *others = free_ports(5)
    options = ("--http-port", "--control-port", "--health-port", "--metrics-port")
    ports = [text for option, other in zip(options, others, strict=True) for text in (option, str(other))]
    command = [sys.executable, "-m", "tpmodel", "serve", str(checkpoint), "--port", str(port), *ports, *OPTIONS]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        with Client(f"127.0.0.1:{port}") as client:
            for _ in range(3):  # Each is a line in the log.
                client.complete(PROMPT, max_tokens=2, **SAMPLING)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait(10)
