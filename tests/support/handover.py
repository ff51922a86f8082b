"""Two gangs that hand requests over, as servers of their own."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from support.waiting import until
from tpmodel import Client, Result
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

TOKEN = "a token of two gangs"
SECONDS = 60.0


def make_server(folder: Path, checkpoint: Path, tp: int, *sources: LocalServer, options: Any = (), **more: Any) -> Any:
    """A server with the token of all of these, which may fetch from the sources; not started yet."""
    token_file = folder / "token"
    token_file.write_text(f"{TOKEN}\n")
    arguments = ["--dtype", "float32", "--kv-cache-memory", "4M", "--log-format", "text"]
    arguments += ["--token-file", str(token_file), *options]
    for source in sources:
        arguments += ["--kv-from", source.control_target]
    # Threads of torch's own that wait for each other are slow where processors are few.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    more = {"device": "cpu", "environment": dict(environment), **more}
    return LocalServer(checkpoint, tp=tp, options=arguments, **more)


def start_all(servers: list[LocalServer]) -> None:
    """At the same time."""
    with ThreadPoolExecutor(len(servers)) as threads:
        list(threads.map(LocalServer.start, servers))


def stop_all(servers: list[LocalServer]) -> None:
    """At the same time."""
    with ThreadPoolExecutor(len(servers)) as threads:
        list(threads.map(LocalServer.stop, servers))


def hand_over(prefill: LocalServer, decode: LocalServer, prompt: Any, **options: Any) -> tuple[Result, Result]:
    """The first gang's part, and the whole as the second one has it."""
    with Client(prefill.target) as first_client, Client(decode.target) as second_client:
        first = first_client.complete(prompt, keep_kv=SECONDS, **options)
        assert first.completion.samples[0].finish_reason == "kept"
        return first, second_client.complete(prompt, continues=first, timeout=SECONDS, **options)


def status(server: LocalServer) -> worker_pb2.GangStatusResponse:
    """What the supervisor says."""
    with grpc.insecure_channel(server.health_target) as channel:
        stub = worker_pb2_grpc.StatusServiceStub(channel)
        return stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10)


def pid_of(server: LocalServer, process: str) -> int:
    """Of one of its processes, such as "rank 1"."""
    return next(entry.pid for entry in status(server).processes if entry.name == process and entry.state != "exited")


def blocks_used(server: LocalServer) -> int:
    """KV blocks that requests hold, running, kept or coming."""
    return status(server).engine.kv_blocks_used


def all_blocks_back(*servers: LocalServer) -> None:
    """Nothing is held any more."""
    for server in servers:
        until(
            lambda server=server: blocks_used(server) == 0, f"all blocks back, {blocks_used(server)} are used", SECONDS
        )
