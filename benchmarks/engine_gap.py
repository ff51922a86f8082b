"""Does a fast device wait for the engine? Idle time between the steps of rank 0, at a given step time.

    python -m benchmarks.engine_gap [--step-ms 1.5] [--tp 1 4 8] [--batch 1 64] [--seconds 2] [--rounds 3]

A real engine process drives stand-ins of ranks over real gRPC; their steps take exactly the given time and no CPU.
While nobody waits, plans have several steps; with more requests than slots every plan has one, and the engine,
whose plans run two ahead, has one step's time for everything. Idle is the device's time without work over all
its time; late are the plans that arrived when it was idle already.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import grpc
import psutil

from benchmarks.engine_client import EngineClient, engine_client
from benchmarks.measured_server import cpu_seconds
from benchmarks.timed_rank import DeviceTimes, run_ranks
from tpmodel.local import free_ports
from tpmodel.v1 import pod_pb2, worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.framing import read_message
from tpmodel_worker.settings import ServeSettings

PROMPT_TOKENS = 16
MAX_MODEL_LEN = 32768
START_SECONDS = 30.0
TOKEN = "benchmark"


@dataclass(frozen=True, slots=True)
class Gap:
    """One row."""

    times: DeviceTimes
    wall: float
    engine_cpu: float

    @property
    def idle(self) -> float:
        """The device's time without work over all its time."""
        idle = sum(self.times.gaps)
        return idle / (idle + self.times.busy_seconds)


class Ranks:
    """Stand-ins in two processes, rank 0 in one of its own; for as long as a `with` block lasts."""

    def __init__(self, world_size: int, step_seconds: float) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.ports: list[int] = []
        self._connections: list[Connection] = []
        for ranks in ([0], list(range(1, world_size))):
            if ranks:
                ours, theirs = spawn.Pipe()
                arguments = (theirs, ranks, world_size, step_seconds)
                spawn.Process(target=run_ranks, args=arguments, daemon=True).start()
                theirs.close()
                self._connections.append(ours)
        for connection in self._connections:
            if not connection.poll(START_SECONDS):
                raise TimeoutError("the stand-ins of the ranks did not start")
            self.ports += connection.recv()

    def take_times(self) -> DeviceTimes:
        """Rank 0's device since the last call."""
        self._connections[0].send(None)
        return self._connections[0].recv()

    def __enter__(self) -> Ranks:
        """They run already."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the processes."""
        for connection in self._connections:
            connection.close()


@contextlib.asynccontextmanager
async def running_engine(settings: ServeSettings, ranks: Ranks) -> AsyncIterator[psutil.Process]:
    """An engine process that serves with these ranks."""
    serving = asyncio.Event()

    async def supervise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (report := await read_message(reader, pod_pb2.ProcessReport)) is not None:
            if report.engine_state.phase == worker_pb2.PHASE_SERVING:
                serving.set()
        writer.close()

    server = await asyncio.start_unix_server(supervise, path=str(settings.report_socket))
    settings_file = Path(settings.runtime_dir) / "settings.json"
    settings_file.write_text(settings.to_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tpmodel_worker.engine", "--settings-file", str(settings_file)]
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(settings.metrics_dir)}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(START_SECONDS):
            await _register(settings, ranks)
            await serving.wait()
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        await process.wait()
        server.close()


async def _register(settings: ServeSettings, ranks: Ranks) -> None:
    """What the supervisor tells the engine."""
    addresses = [worker_pb2.RankAddress(rank=rank, pid=1, port=port) for rank, port in enumerate(ranks.ports)]
    request = worker_pb2.RegisterRequest(
        pod_uid="local", address="127.0.0.1", attempt=1, ranks=addresses, rendezvous="127.0.0.1:1"
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{settings.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        await stub.Register(request, metadata=token_metadata(TOKEN), timeout=START_SECONDS, wait_for_ready=True)


async def measure(settings: ServeSettings, ranks: Ranks, engine: psutil.Process, waiting: int, seconds: float) -> Gap:
    """Lets as many requests decode as there are slots, while others wait."""
    async with engine_client(settings.front_socket) as client:
        for handle in range(settings.max_num_seqs + waiting):
            client.submit(handle, [2 + handle] * PROMPT_TOKENS, MAX_MODEL_LEN - PROMPT_TOKENS)
        await _read_for(client, 1.0)
        ranks.take_times()
        begun, used = time.perf_counter(), cpu_seconds(engine)
        await _read_for(client, seconds)
        gap = Gap(ranks.take_times(), time.perf_counter() - begun, cpu_seconds(engine) - used)
        client.cancel_all()
        return gap


async def _read_for(client: EngineClient, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await client.read()


def run(world_size: int, batch: int, waiting: int, *, step_seconds: float, seconds: float, rounds: int) -> Gap:
    """One engine, one load; of several rounds the one in the middle, by idle time."""
    # Not TMPDIR: the path of a Unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder, Ranks(world_size, step_seconds) as ranks:
        Path(folder, "config.json").write_text("{}", encoding="utf-8")
        settings = ServeSettings(
            model_path=folder,
            model_id="timed",
            served_name="timed",
            load_format="dummy",
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=batch,
            world_size=world_size,
            token=TOKEN,
            control_port=free_ports(1)[0],
            runtime_dir=folder,
        )
        settings.metrics_dir.mkdir()
        gaps = asyncio.run(_run(settings, ranks, waiting, seconds, rounds))
    return sorted(gaps, key=lambda gap: gap.idle)[rounds // 2]


async def _run(settings: ServeSettings, ranks: Ranks, waiting: int, seconds: float, rounds: int) -> list[Gap]:
    async with running_engine(settings, ranks) as engine:
        return [await measure(settings, ranks, engine, waiting, seconds) for _ in range(rounds)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step-ms", type=float, default=1.5)
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(f"steps of {arguments.step_ms} ms, {os.cpu_count()} cores for the engine and the stand-ins of the ranks; "
          f"the middle one of {arguments.rounds} rounds")  # fmt: skip
    print("| tp | batch | others wait | steps/s | steps/plan | idle | late plans | median gap, ms "
          "| engine us/plan | engine cores |")  # fmt: skip
    print("| ---: | ---: | --- |" + " ---: |" * 7)
    for tp in arguments.tp:
        for batch in arguments.batch:
            for waiting in (0, 1):
                gap = run(
                    tp,
                    batch,
                    waiting,
                    step_seconds=arguments.step_ms / 1000,
                    seconds=arguments.seconds,
                    rounds=arguments.rounds,
                )
                print(_row(tp, batch, waiting, gap), flush=True)


def _row(tp: int, batch: int, waiting: int, gap: Gap) -> str:
    times = gap.times
    columns = [str(tp), str(batch), "yes" if waiting else "no", f"{times.steps / gap.wall:.0f}"]
    columns += [f"{times.steps / times.plans:.1f}", f"{gap.idle:.1%}"]
    columns += [f"{len(times.gaps) / times.plans:.0%}", f"{1000 * statistics.median(times.gaps or [0.0]):.2f}"]
    columns += [f"{1e6 * gap.engine_cpu / times.plans:.0f}", f"{gap.engine_cpu / gap.wall:.2f}"]
    return "| " + " | ".join(columns) + " |"


if __name__ == "__main__":
    main()
