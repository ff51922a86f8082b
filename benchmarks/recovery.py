"""How long a fault keeps streams waiting: detection, the rebuild by phase, the next token of every stream.

    python -m benchmarks.recovery [--rounds 5] [--respawn fork spare cold] [--tp 2]

A server on CPU ranks with four endless streams, read through the Python client. In every round a rank is killed, a
rank is stopped (SIGSTOP, so that the step deadline has to find it), the engine is killed, the api process is killed;
for each way to a new rank process. Beside it the time of a restart of the whole server, from its start to the first
token of a stream. Median and worst of all rounds; a phase is the median.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from tpmodel import Client, TpmodelError
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

MODEL = Path(__file__).parent.parent / "examples" / "default_model"
STREAMS = 4
STEP_DEADLINE = 2.0
OPTIONS = (
    *("--dtype", "float32", "--kv-cache-memory", "16M", "--log-format", "json"),
    *("--recovery", "in-place", "--rebuild-limit", "10000", "--step-deadline", str(STEP_DEADLINE)),
)
PHASES = ("abort", "respawn", "init", "check", "map", "clear", "first_step")
SETTLE_SECONDS = 2.0
"""Of undisturbed streams between two faults."""
WAIT_SECONDS = 120.0


class Stream:
    """Reads one endless stream after the other, in a thread of its own, and notes when tokens come."""

    def __init__(self, target: str, index: int) -> None:
        self.arrivals: list[float] = []
        self.error: TpmodelError | None = None
        self._target = target
        self._index = index
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        prompt = [16 + (31 * self._index + position) % 200 for position in range(8)]
        with Client(self._target) as client:
            while not self._stop.is_set():
                try:
                    for _ in client.generate(prompt, max_tokens=400, temperature=0.0, ignore_eos=True):
                        self.arrivals.append(time.time())
                except TpmodelError as error:
                    self.error = error
                    return

    def stop(self) -> None:
        """Begins no further stream."""
        self._stop.set()

    def next_token(self, fault: float) -> float:
        """Seconds from the fault to the token that ends the stream's longest pause since."""
        arrivals = [at for at in self.arrivals if at > fault - 1.0]
        pauses = [(after - before, after) for before, after in itertools.pairwise(arrivals) if after > fault]
        return max(pauses)[1] - fault


@dataclass(slots=True)
class Figures:
    """Seconds, of every round."""

    detection: list[float] = field(default_factory=list)
    phases: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PHASES})
    tokens: list[float] = field(default_factory=list)


class Server:
    """A server whose processes are harmed."""

    def __init__(self, server: LocalServer) -> None:
        self.target = server.target
        self._channel = grpc.insecure_channel(server.health_target)
        self._stub = worker_pb2_grpc.StatusServiceStub(self._channel)

    def close(self) -> None:
        """Leaves it alone."""
        self._channel.close()

    def status(self) -> worker_pb2.GangStatusResponse:
        """As `tpmodel status` gets it."""
        return self._stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10)

    def process(self, name: str) -> worker_pb2.ProcessStatus:
        """The newest process of that name."""
        return next(process for process in self.status().processes if process.name == name)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Polls, seldom enough to disturb nobody."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {WAIT_SECONDS:.0f} s: {self.status()}")
            time.sleep(0.05)

    def rebuild(self, number: signal.Signals, ranks: int) -> tuple[float, worker_pb2.Rebuild]:
        """Signals a rank; when, and what the engine says of the rebuild that followed."""
        before = self.status().engine.rebuilds
        pid = self.process(f"rank {random.randrange(ranks)}").pid
        fault = time.time()
        os.kill(pid, number)
        self.wait(lambda: any(rebuild.unix_seconds > fault for rebuild in self.status().engine.last_rebuilds))
        engine = self.status().engine
        if engine.rebuilds != before + 1:
            print(f"one {number.name} led to {engine.rebuilds - before} rebuilds", flush=True)
        return fault, engine.last_rebuilds[-1]

    def kill(self, name: str) -> float:
        """SIGKILLs a process that is started again; when."""
        pid = self.process(name).pid
        fault = time.time()
        os.kill(pid, signal.SIGKILL)
        self.wait(lambda: (now := self.process(name)).pid != pid and now.state == "running")
        self.wait(lambda: self.status().engine.phase == worker_pb2.PHASE_SERVING)
        return fault


def flow(streams: Sequence[Stream], since: float) -> None:
    """Waits until every stream has had a token since then, and for a while longer."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not all(stream.arrivals and stream.arrivals[-1] > since for stream in streams):
        errors = [stream.error for stream in streams if stream.error is not None]
        if errors or time.monotonic() > deadline:
            raise RuntimeError(f"a stream does not go on: {errors}")
        time.sleep(0.05)
    time.sleep(SETTLE_SECONDS)


def measure(server: Server, streams: Sequence[Stream], *, rounds: int, ranks: int) -> dict[str, Figures]:
    """Every fault in every round."""
    found = {
        name: Figures()
        for name in ("SIGKILL of a rank", "SIGSTOP of a rank", "SIGKILL of the engine", "SIGKILL of the api process")
    }
    killed, stopped, engine, api = found.values()
    for _ in range(rounds):
        for figures, number in ((killed, signal.SIGKILL), (stopped, signal.SIGSTOP)):
            fault, rebuild = server.rebuild(number, ranks)
            flow(streams, time.time())
            figures.detection.append(rebuild.unix_seconds - fault)
            for phase in rebuild.phases:
                if phase.name in figures.phases:
                    figures.phases[phase.name].append(phase.seconds)
            figures.tokens.append(max(stream.next_token(fault) for stream in streams))
        for figures, name in ((engine, "engine"), (api, "api 0")):
            fault = server.kill(name)
            flow(streams, time.time())
            figures.tokens.append(max(stream.next_token(fault) for stream in streams))
    return found


def run(respawn: str, *, rounds: int, ranks: int) -> tuple[float, dict[str, Figures]]:
    """One server: seconds from its start to a first token, and the figures of its faults."""
    options: list[Any] = [*OPTIONS, "--respawn", respawn]
    begun = time.monotonic()
    with LocalServer(MODEL, tp=ranks, device="cpu", options=options) as local:
        with Client(local.target) as client:
            client.complete([16, 17, 18], max_tokens=1, temperature=0.0, ignore_eos=True)
        start = time.monotonic() - begun
        server = Server(local)
        streams = [Stream(local.target, index) for index in range(STREAMS)]
        try:
            flow(streams, time.time())
            return start, measure(server, streams, rounds=rounds, ranks=ranks)
        finally:
            for stream in streams:
                stream.stop()
            server.close()


def median_and_worst(values: Sequence[float]) -> str:
    """For a column of the table."""
    return f"{statistics.median(values):.2f} / {max(values):.2f}" if values else "-"


def main() -> None:
    """Prints the table, in the form of the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--respawn", nargs="+", default=["fork", "spare", "cold"], choices=["fork", "spare", "cold"])
    arguments = parser.parse_args()
    print(f"seconds, median / worst of {arguments.rounds} rounds; step deadline {STEP_DEADLINE} s, tp {arguments.tp}\n")
    print(f"| fault | new process | detected | {' | '.join(PHASES)} | next token of every stream |")
    print("|" + " --- |" * (len(PHASES) + 4))
    starts = {}
    for respawn in arguments.respawn:
        starts[respawn], found = run(respawn, rounds=arguments.rounds, ranks=arguments.tp)
        for fault, figures in found.items():
            phases = [f"{statistics.median(seconds):.2f}" if seconds else "-" for seconds in figures.phases.values()]
            columns = [fault, respawn, median_and_worst(figures.detection), *phases, median_and_worst(figures.tokens)]
            print(f"| {' | '.join(columns)} |", flush=True)
    print("\nrestart of the whole server, to a first token: " + ", ".join(f"{k} {v:.1f}" for k, v in starts.items()))


if __name__ == "__main__":
    main()
