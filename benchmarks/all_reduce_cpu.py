"""Latency of a float32 all-reduce among CPU ranks: shared memory beside Gloo, in one run.

    python -m benchmarks.all_reduce_cpu

Every rank is a process, as when serving. The median over batches is printed, in microseconds, on rank 0.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence

import torch

from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.comm.gloo import build_gloo
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.comm.shared_memory import SLOT_BYTES, SharedMemoryCommunicator
from tpmodel_worker.comm.shared_memory_library import load_library
from tpmodel_worker.comm.specification import CommunicatorSpec

WORLD_SIZES = (2, 4)
MESSAGE_BYTES = (4 << 10, 64 << 10, 1 << 20, 8 << 20)
BATCHES = 15
BATCH_SECONDS = 0.03
"""About how long a batch lasts; how many all-reduces that are is measured first."""
DEADLINE_SECONDS = 120.0
CPU = torch.device("cpu")
EPOCH = 1


def time_all_reduce(communicator: Communicator, message_bytes: int) -> float:
    """Median microseconds of one all-reduce."""
    tensor = torch.zeros(message_bytes // 4)
    calls = _calls_per_batch(communicator, tensor)
    batches = []
    for _ in range(BATCHES):
        communicator.barrier()
        started = time.perf_counter()
        for _ in range(calls):
            communicator.all_reduce(tensor)
        batches.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(batches)


def _calls_per_batch(communicator: Communicator, tensor: torch.Tensor) -> int:
    """The same on every rank: rank 0 measures and tells the others."""
    for _ in range(3):
        communicator.all_reduce(tensor)
    started = time.perf_counter()
    for _ in range(5):
        communicator.all_reduce(tensor)
    calls = torch.tensor(max(5.0, BATCH_SECONDS / ((time.perf_counter() - started) / 5)))
    return int(communicator.broadcast(calls, 0).item())


def run_rank(communicator: Communicator) -> list[float]:
    """All sizes, in order."""
    times = [time_all_reduce(communicator, message_bytes) for message_bytes in MESSAGE_BYTES]
    communicator.barrier()
    return times


def fork(run: Callable[[int], list[float] | None]) -> tuple[int, int]:
    """Runs a function, which is given a descriptor to write lines to, in a new process; its pid and the read end."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        code = 1
        try:
            torch.set_num_threads(1)
            os.write(writer, (json.dumps(run(writer)) + "\n").encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    return pid, reader


def shared_memory_ranks(world_size: int) -> list[Callable[[int], list[float]]]:
    """Ranks over arenas that this process made, as the supervisor would keep them."""
    library = load_library()
    size = library.tpmodel_arena_bytes(SLOT_BYTES)
    arenas = [Arena.create(ArenaId(rank, "comm"), size, CPU) for rank in range(world_size)]
    for arena in arenas:
        library.tpmodel_arena_reset(arena.bytes.data_ptr(), SLOT_BYTES, EPOCH)

    def rank_program(rank: int) -> Callable[[int], list[float]]:
        return lambda _writer: run_rank(
            SharedMemoryCommunicator(
                rank=rank, epoch=EPOCH, arenas=arenas, slot_bytes=SLOT_BYTES, deadline_seconds=DEADLINE_SECONDS
            )
        )

    return [rank_program(rank) for rank in range(world_size)]


def gloo_ranks(world_size: int, port: int) -> list[Callable[[int], list[float]]]:
    """Ranks that meet at the store."""

    def rank_program(rank: int) -> Callable[[int], list[float]]:
        spec = CommunicatorSpec(
            epoch=EPOCH,
            rank=rank,
            world_size=world_size,
            rendezvous=f"127.0.0.1:{port}",
            rendezvous_id=f"gloo-{world_size}",
            timeout_seconds=DEADLINE_SECONDS,
            pods=[str(peer) for peer in range(world_size)],
            kind="gloo",
            deadline_seconds=DEADLINE_SECONDS,
        )
        return lambda _writer: run_rank(build_gloo(spec, meeting=Meeting(spec, threading.Event())))

    return [rank_program(rank) for rank in range(world_size)]


def run_world(programs: Sequence[Callable[[int], list[float]]]) -> list[float]:
    """One process for each program; what rank 0's returned."""
    children = [fork(program) for program in programs]
    lines: list[str] = []
    for pid, reader in children:
        with os.fdopen(reader) as stream:
            lines.append(stream.readline())
        _, status = os.waitpid(pid, 0)
        if status != 0:
            raise SystemExit(f"a rank ended with status {status}")
    return json.loads(lines[0])


def serve_store(writer: int) -> None:
    """Writes the store's port and lives until it is killed."""
    store = start_store("127.0.0.1")
    os.write(writer, f"{store.port}\n".encode())
    time.sleep(DEADLINE_SECONDS)


def main() -> None:
    """Prints the table."""
    store_pid, store_reader = fork(serve_store)
    try:
        with os.fdopen(store_reader) as stream:
            port = int(stream.readline())
        print(f"{os.cpu_count()} processors, float32, median of {BATCHES} batches, microseconds")
        print(f"{'ranks':>5} {'bytes':>9} {'shared memory':>14} {'Gloo':>10} {'ratio':>6}")
        for world_size in WORLD_SIZES:
            ours = run_world(shared_memory_ranks(world_size))
            gloo = run_world(gloo_ranks(world_size, port))
            for message_bytes, our, theirs in zip(MESSAGE_BYTES, ours, gloo, strict=True):
                print(f"{world_size:>5} {message_bytes:>9} {our:>14.1f} {theirs:>10.1f} {theirs / our:>6.1f}")
    finally:
        os.kill(store_pid, 9)
        os.waitpid(store_pid, 0)


if __name__ == "__main__":
    main()
