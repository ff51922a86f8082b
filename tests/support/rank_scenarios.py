"""What ranks without a model do in tests. Each function runs in a process of its own (see rank_processes)."""

from __future__ import annotations

import gc
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from support.collective_inputs import expected_sum, rank_input
from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaMemoryError, ArenaSizeError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.comm.communicator import Communicator, CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.comm.rendezvous import run_rendezvous
from tpmodel_worker.settings import ServeSettings

CPU = torch.device("cpu")
MEBIBYTE = 1 << 20
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.int64)} | {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def join(
    rank: int,
    world_size: int,
    socket: str,
    rendezvous: str,
    epoch: int,
    kind: str = "auto",
    pods: list[str] | None = None,
    timeout_seconds: float = 20.0,
    deadline_seconds: float = 20.0,
    cancelled: threading.Event | None = None,
    break_link: bool = False,
    device: str = "cpu",
) -> Communicator:
    """Builds the communicator of a rank as its process would; with break_link, without its supervisor."""
    spec = CommunicatorSpec(
        epoch=epoch,
        rank=rank,
        world_size=world_size,
        rendezvous=rendezvous,
        rendezvous_id=f"epoch-{epoch}",
        timeout_seconds=timeout_seconds,
        pods=pods or ["local"] * world_size,
        kind=kind,
        deadline_seconds=deadline_seconds,
    )
    client = ArenaClient(Path(socket))
    if break_link:
        client.close()
    return build_communicator(spec, device=_device(device, rank), arenas=client, cancelled=cancelled)


def _device(kind: str, rank: int) -> torch.device:
    return torch.device("cuda", rank % torch.cuda.device_count()) if kind == "cuda" else CPU


def reduce_all(dtype: str, counts: list[int], exact: bool = True, **world: Any) -> str:
    """Sums tensors of several sizes and compares with the sum in the order of the ranks; the communicator's name."""
    communicator = join(**world)
    for count in counts:
        summed = rank_input(communicator.rank, count, DTYPES[dtype]).to(communicator.device)
        tensor = communicator.all_reduce(summed).cpu()
        expected = expected_sum(communicator.world_size, count, DTYPES[dtype])
        if exact:
            assert torch.equal(tensor, expected), f"{count} items of {dtype}"
        else:
            # Other orders of the sum round differently, each addition relative to what it adds.
            terms = [rank_input(rank, count, DTYPES[dtype]).abs().double() for rank in range(communicator.world_size)]
            bound = communicator.world_size * torch.finfo(tensor.dtype).eps * torch.stack(terms).sum(0)
            assert ((tensor.double() - expected.double()).abs() <= bound).all(), f"{count} items of {dtype}"
    communicator.close()
    return communicator.name


def reduce_to_list(count: int, dtype: str, **world: Any) -> list[float]:
    """The sum itself, to be compared among ranks."""
    communicator = join(**world)
    tensor = communicator.all_reduce(rank_input(communicator.rank, count, DTYPES[dtype]).to(communicator.device))
    values = tensor.double().tolist()
    communicator.close()
    return values


def gather_and_broadcast(**world: Any) -> str:
    """Every dtype by bytes, of odd sizes."""
    communicator = join(**world)
    size, rank = communicator.world_size, communicator.rank
    for dtype in (torch.uint8, torch.bool, torch.int32, torch.int64, torch.bfloat16, torch.float32):
        for count in (1, 3, 1001, 300_007):
            parts = [_pattern(peer, count, dtype).to(communicator.device) for peer in range(size)]
            assert torch.equal(communicator.all_gather(parts[rank]), torch.stack(parts)), (dtype, count)
            for root in range(size):
                tensor = parts[rank].clone()
                assert torch.equal(communicator.broadcast(tensor, root), parts[root]), (dtype, count, root)
    communicator.close()
    return communicator.name


def _pattern(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(count) * 7 + rank).remainder(2 if dtype is torch.bool else 251).to(dtype)


def reduce_until_failure(**world: Any) -> dict[str, Any]:
    """Sums without end; says how it ended, and that every sum before was right."""
    communicator = join(**world)
    rounds = 0
    try:
        while True:
            rounds += 1
            # Sizes of one piece and of several, with values that show a slot read too early or too late.
            tensor = communicator.all_reduce(torch.full((1 + 31_013 * (rounds % 13),), float(rounds)))
            assert bool((tensor == rounds * communicator.world_size).all()), rounds
    except CommunicatorError as error:
        return {"error": type(error).__name__, "message": str(error), "rounds": rounds}
    finally:
        communicator.close()


def survive(next_epoch: int, counts: list[int], **world: Any) -> dict[str, Any]:
    """reduce_until_failure, then the next epoch in the same process."""
    ended = reduce_until_failure(**world)
    world["epoch"] = next_epoch
    reduce_all("float32", counts, **world)
    return ended


def wait_and_be_aborted(abort_after: float, comes: list[int], **world: Any) -> float:
    """Seconds from abort, by another thread, to the release from a collective for which only some ranks come."""
    communicator = join(**world)
    if communicator.rank not in comes:
        # Longer than the others wait: its end would release them as well.
        time.sleep(abort_after + 2.0)
        return 0.0
    aborted: list[float] = []

    def abort() -> None:
        time.sleep(abort_after)
        aborted.append(time.monotonic())
        communicator.abort("the test says so")

    threading.Thread(target=abort).start()
    try:
        communicator.all_reduce(torch.ones(5))
    except CommunicatorAbortedError:
        released = time.monotonic()
        communicator.close()
        return released - aborted[0]
    raise AssertionError("the collective ended without its peers")


def cancel_build(cancel_after: float, **world: Any) -> float:
    """Seconds from cancelling to the end of a build that lacks a member."""
    cancelled = threading.Event()
    at = time.monotonic() + cancel_after
    threading.Timer(cancel_after, cancelled.set).start()
    try:
        join(cancelled=cancelled, **world)
    except CommunicatorAbortedError:
        return time.monotonic() - at
    raise AssertionError("a world was built without all its members")


def fill_arena_and_hang(rank: int, socket: str, size: int, device: str = "cpu") -> None:
    """Makes an arena, fills it with 0 to 255 over and over, and never returns."""
    arena = Arena.create(ArenaId(rank, "weights"), size, _device(device, rank))
    arena.bytes.copy_(torch.arange(size).remainder(256))
    if device == "cuda":
        torch.cuda.synchronize()
    ArenaClient(Path(socket)).store(arena, worker_pb2.ArenaManifest())
    time.sleep(60)


def sum_arena(rank: int, socket: str, device: str = "cpu") -> int:
    """Maps what rank 0 left and adds it up."""
    del rank
    fetched = ArenaClient(Path(socket)).fetch(ArenaId(0, "weights"))
    assert fetched is not None
    arena = Arena.map(ArenaId(0, "weights"), fetched[0], fetched[1].bytes, _device(device, 0))
    return int(arena.bytes.long().sum())


def use_device_arena(rank: int) -> str:
    """What holds for arenas on CPU holds on a GPU."""
    device = _device("cuda", rank)
    arena_id = ArenaId(rank, "kv")
    torch.empty(1, device=device)
    free_before, _ = torch.cuda.mem_get_info(device)
    arena = Arena.create(arena_id, 1024 * MEBIBYTE + 1, device)
    assert arena.size % (2 * MEBIBYTE) == 0
    assert arena.size > 1024 * MEBIBYTE
    assert (arena.bytes.device, arena.device) == (device, device)
    view = arena.view(256, (1000, 7), torch.bfloat16).fill_(1.5)
    again = Arena.map(arena_id, os.dup(arena.descriptor), arena.size, device)
    assert again.bytes.data_ptr() != arena.bytes.data_ptr()
    assert torch.equal(again.view(256, (1000, 7), torch.bfloat16), view)
    with pytest.raises(ArenaSizeError, match=str(2 * arena.size)):
        Arena.map(arena_id, os.dup(arena.descriptor), 2 * arena.size, device)
    with pytest.raises(ArenaMemoryError, match=f"needs {1 << 40} bytes"):
        Arena.create(arena_id, 1 << 40, device)
    again.close()
    arena.close()
    del view
    gc.collect()
    free_after, _ = torch.cuda.mem_get_info(device)
    # The comparisons' own memory and kernels stay.
    assert free_after > free_before - 256 * MEBIBYTE, (free_before, free_after)
    return "done"


def reduce_on_device_for_ever(**world: Any) -> None:
    """The peer that is killed."""
    communicator = join(**world)
    while True:
        communicator.all_reduce(torch.ones(4096, device=communicator.device))
        torch.cuda.synchronize()


def survive_on_device(next_epoch: int, started: str, fault: str, **world: Any) -> dict[str, Any]:
    """Sums until the file fault appears, whereupon another thread aborts; then the next epoch in the same process."""
    communicator = join(**world)
    weights = torch.arange(MEBIBYTE, device=communicator.device)
    abort_seconds: list[float] = []

    def abort() -> None:
        while not Path(fault).exists():
            time.sleep(0.005)
        at = time.monotonic()
        communicator.abort("the peer was killed")
        abort_seconds.append(time.monotonic() - at)

    aborter = threading.Thread(target=abort)
    aborter.start()
    ended = ""
    try:
        while True:
            for _ in range(20):
                communicator.all_reduce(torch.ones(4096, device=communicator.device))
            torch.cuda.synchronize()
            Path(started).touch()
    except CommunicatorError as error:
        ended = type(error).__name__
    aborter.join()
    communicator.close()
    intact = torch.equal(weights.cpu(), torch.arange(MEBIBYTE))
    world["epoch"] = next_epoch
    reduce_all("float32", [5], exact=False, **world)
    return {"error": ended, "weights_intact": intact, "abort_seconds": abort_seconds[0]}


def serve_store(rank: int, settings_json: str) -> str:
    """The rendezvous process."""
    del rank
    run_rendezvous(ServeSettings.from_json(settings_json))
    return "ended"
