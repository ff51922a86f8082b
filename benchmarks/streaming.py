"""256 streaming clients: tokens/s that are served, with text, against what the engine does without anybody's help.

    python -m benchmarks.streaming [--streams 256] [--output-tokens 128] [--rounds 3]

The same load goes straight into the engine's front socket (ids in, ids out) and through gRPC (streamed, text on):
on one channel and on one for each stream, from one client process and from two, to one api process and to two.
A tiny model, so that the ranks leave room for the rest. All processes share the machine's cores: where they are all
busy, what limits is the sum of the CPU times of a token; else it is one process, since Python runs on one core at
a time. Both show in the table: CPU time of each kind of process for a token, and cores busy in all.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from benchmarks.dummy_checkpoint import default_config, write_dummy_checkpoint
from benchmarks.engine_client import engine_client
from benchmarks.measured_server import MeasuredServer, measured_server
from tpmodel import AsyncClient

PROMPT_TOKENS = 8
MAX_MODEL_LEN = 1024
START_SECONDS = 60.0
RUN_SECONDS = 300.0
CONFIG_CHANGES = {
    "dtype": "float32",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


@dataclass(frozen=True, slots=True)
class Load:
    """What all clients together ask for."""

    streams: int
    output_tokens: int

    @property
    def tokens(self) -> int:
        """Of all streams."""
        return self.streams * self.output_tokens


@dataclass(frozen=True, slots=True)
class Clients:
    """How the streams are spread over client processes, and over channels in all."""

    processes: int
    channels: int


@dataclass(frozen=True, slots=True)
class Figures:
    """One run. CPU times are in microseconds for each token."""

    tokens_per_second: float
    tokens_per_chunk: float
    engine_us: float
    ranks_us: float
    api_us: float
    clients_us: float
    cores: float
    """CPU time of all processes over the wall clock."""


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What the clients of one run did."""

    chunks: int
    cpu_seconds: float


def prompt(index: int) -> list[int]:
    """Ids of one stream's prompt."""
    return [16 + (31 * index + 7 * position) % 2000 for position in range(PROMPT_TOKENS)]


def measure(server: MeasuredServer, load: Load, run: Callable[[], ClientResult]) -> Figures:
    """Runs the clients and puts their figures beside the server's."""
    before, begun = server.cpu_times(), time.perf_counter()
    result = run()
    spent, wall = server.cpu_times().since(before), time.perf_counter() - begun
    total = spent.engine + spent.ranks + spent.api + result.cpu_seconds
    microseconds = 1e6 / load.tokens
    return Figures(
        tokens_per_second=load.tokens / wall,
        tokens_per_chunk=load.tokens / result.chunks,
        engine_us=spent.engine * microseconds,
        ranks_us=spent.ranks * microseconds,
        api_us=spent.api * microseconds,
        clients_us=result.cpu_seconds * microseconds,
        cores=total / wall,
    )


# ------------------------------------------------------------------------------------ straight into the engine


async def feed_engine(front_socket: Path, load: Load) -> ClientResult:
    """The load as one api process hands it on, from this process."""
    begun, chunks = time.process_time(), 0
    async with engine_client(front_socket) as client:
        for index in range(load.streams):
            client.submit(index, prompt(index), load.output_tokens)
        while client.finished < load.streams:
            await client.read()
        chunks = client.outputs
    return ClientResult(chunks, time.process_time() - begun)


# ------------------------------------------------------------------------------------------------ through gRPC


async def _stream(client: AsyncClient, index: int, load: Load) -> int:
    chunks = tokens = 0
    stream = client.generate(
        prompt(index), max_tokens=load.output_tokens, temperature=0, ignore_eos=True, detokenize=True
    )
    async for chunk in stream:
        chunks += 1
        tokens += len(chunk.token_ids)
    assert tokens == load.output_tokens, f"{tokens} tokens instead of {load.output_tokens}"
    return chunks


async def _stream_all(connection: Connection, target: str, indices: range, channels: int, load: Load) -> None:
    """Connects and says so, waits for the word, streams and reports."""
    clients = [AsyncClient(target) for _ in range(channels)]
    for client in clients:
        await client.model_info()
    connection.send(None)
    await asyncio.to_thread(connection.recv)
    begun = time.process_time()
    streams = (_stream(clients[index % channels], index, load) for index in indices)
    chunks = sum(await asyncio.gather(*streams))
    connection.send(ClientResult(chunks, time.process_time() - begun))
    for client in clients:
        await client.close()


def _client_process(connection: Connection, target: str, indices: range, channels: int, load: Load) -> None:
    asyncio.run(_stream_all(connection, target, indices, channels, load))


class ClientProcesses:
    """Connected processes that wait for run(), once."""

    def __init__(self, target: str, clients: Clients, load: Load) -> None:
        """Returns when all of them are connected."""
        spawn = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for number in range(clients.processes):
            ours, theirs = spawn.Pipe()
            indices = range(number, load.streams, clients.processes)
            arguments = (theirs, target, indices, clients.channels // clients.processes, load)
            process = spawn.Process(target=_client_process, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        self._receive(START_SECONDS)

    def run(self) -> ClientResult:
        """Lets all of them stream; returns when the last has got its last token."""
        for connection in self._connections:
            connection.send(None)
        results: list[ClientResult] = self._receive(RUN_SECONDS)
        return ClientResult(sum(result.chunks for result in results), sum(result.cpu_seconds for result in results))

    def join(self) -> None:
        """Waits for the processes' end."""
        for process in self._processes:
            process.join(START_SECONDS)

    def _receive(self, timeout: float) -> list[Any]:
        deadline = time.monotonic() + timeout
        messages = []
        for connection in self._connections:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"a client process did not answer within {timeout:g} s")
            messages.append(connection.recv())
        return messages


def serve_clients(server: MeasuredServer, clients: Clients, load: Load) -> Figures:
    """One run through gRPC."""
    processes = ClientProcesses(server.target, clients, load)
    figures = measure(server, load, processes.run)
    processes.join()
    return figures


# ----------------------------------------------------------------------------------------------------- the table


def compare(folder: Path, api_processes: int, load: Load, rounds: int) -> None:
    """One server start; all ways in take turns, so that a machine whose speed drifts treats them alike."""
    options = [
        *("--load-format", "dummy", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", str(load.streams)),
        *("--api-processes", str(api_processes), "--no-prefix-cache", "--kv-cache-memory", "64Mi"),
        *("--drain-timeout", "5"),
    ]  # fmt: skip
    figures: dict[Clients | None, list[Figures]] = {}
    with measured_server(folder, tp=1, options=options) as server:

        def once(clients: Clients | None, work: Load) -> Figures:
            if clients is not None:
                return serve_clients(server, clients, work)
            return measure(server, work, lambda: asyncio.run(feed_engine(server.settings.front_socket, work)))

        ways = [None, Clients(1, 1), Clients(1, load.streams), Clients(2, 2), Clients(2, load.streams)]
        for way in ways[:2]:
            once(way, Load(load.streams, 8))
        for _ in range(rounds):
            for way in ways:
                figures.setdefault(way, []).append(once(way, load))
    alone = _median(figures[None])
    for way, runs in figures.items():
        print(_row(api_processes, way, _median(runs), alone), flush=True)


def _median(runs: list[Figures]) -> Figures:
    """The run in the middle, by tokens/s."""
    return sorted(runs, key=lambda run: run.tokens_per_second)[len(runs) // 2]


def _row(api_processes: int, way: Clients | None, run: Figures, alone: Figures) -> str:
    name = "engine alone" if way is None else f"gRPC, api {api_processes}, clients {way.processes}"
    channels = "-" if way is None else str(way.channels)
    columns = [name, channels, f"{run.tokens_per_second:.0f}"]
    columns += [f"{run.tokens_per_second / alone.tokens_per_second:.0%}", f"{run.tokens_per_chunk:.1f}"]
    columns += [f"{value:.0f}" for value in (run.engine_us, run.ranks_us, run.api_us, run.clients_us)]
    return "| " + " | ".join([*columns, f"{run.cores:.2f}"]) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--api-processes", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    load = Load(arguments.streams, arguments.output_tokens)
    print(f"{load.streams} streams of {PROMPT_TOKENS} + {load.output_tokens} tokens, tp 1, the middle one of "
          f"{arguments.rounds} runs;\n{os.cpu_count()} cores for ranks, engine, api and clients together: "
          "where all are busy, the CPU time of a token limits; else one process does")  # fmt: skip
    print("| | channels | tokens/s | of engine alone | tokens/chunk | engine us/token | ranks us/token | api us/token "
          "| clients us/token | cores busy |")  # fmt: skip
    print("| --- |" + " ---: |" * 9)
    with tempfile.TemporaryDirectory() as folder:
        write_dummy_checkpoint(Path(folder), default_config() | CONFIG_CHANGES)
        for api_processes in arguments.api_processes:
            compare(Path(folder), api_processes, load, arguments.rounds)


if __name__ == "__main__":
    main()
