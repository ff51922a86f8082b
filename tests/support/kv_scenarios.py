"""What the two ends of a KV pipe do in tests. Each function runs in a process of its own (see rank_processes)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from tpmodel_worker.kv.pipe import KvPipe, KvPipeConfig, KvPipeError

MEBIBYTE = 1 << 20
SHAPES = [(3, 5), (), (0, 4), (2, 1, 2, 1, 2, 1, 2, 1), (1000,)]
DTYPES = ["float32", "float64", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"]
DTYPES += ["float8_e4m3fn", "float8_e5m2"]


def open_pipe(rank: int, port: int, folder: str, **changes: Any) -> KvPipe:
    """This rank's end."""
    fields: dict[str, Any] = {
        "rank": rank,
        "local_rank": rank,
        "address": "127.0.0.1",
        "master_address": "127.0.0.1",
        "base_port": port,
        "token": "secret",
        "store_timeout_seconds": 30.0,
        "deadline_seconds": 20.0,
    }
    return KvPipe(KvPipeConfig(**(fields | changes)))


def _until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def _raised(call: Callable[[], object]) -> dict[str, str]:
    try:
        call()
    except KvPipeError as error:
        return {"error": type(error).__name__, "message": str(error)}
    return {}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _all_kinds(seed: int) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    items: list[torch.Tensor | None] = [None]
    for name in DTYPES:
        for shape in SHAPES:
            tensor = torch.randint(0, 2, shape, generator=generator).to(getattr(torch, name))
            items += [tensor, None] if shape == () else [tensor]
    # Neither contiguous nor without gradient.
    items += [torch.randn(40, 50, generator=generator).t()[::2], torch.randn(7, generator=generator).requires_grad_()]
    return items


def exchange(rank: int, world_size: int, **arguments: Any) -> int:
    """Every member sends items of all kinds and compares what comes from the one before it."""
    with open_pipe(rank, world_size=world_size, **arguments) as pipe:
        for item in _all_kinds(rank):
            pipe.send(item)
        expected = _all_kinds((rank - 1) % world_size)
        for number, item in enumerate(expected):
            received = pipe.receive()
            if item is None:
                assert received is None, number
                continue
            assert received is not None, number
            assert (received.dtype, received.shape) == (item.dtype, item.shape)
            assert _bits(received) == _bits(item.detach())
            assert not received.is_inference()
        _until(lambda: pipe.queued_bytes == 0)
        assert pipe.ready_bytes == 0
        return len(expected)


def receive_first(rank: int, size: int, **arguments: Any) -> bool:
    """Both ends wait in receive before either sends, and what they send is larger than any socket's buffer."""
    with open_pipe(rank, **arguments) as pipe, ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(pipe.receive)
        time.sleep(0.3)
        assert not waiting.done()
        pipe.send(torch.full((size,), rank, dtype=torch.uint8))
        received = waiting.result()
        assert received is not None
        return bool((received == 1 - rank).all()) and received.numel() == size


def none_counts_nothing(rank: int, **arguments: Any) -> int:
    """Member 1 asks for nothing beyond its first tensor; what member 0 queues is counted."""
    with open_pipe(rank, receive_limit_bytes=0, **arguments) as pipe:
        if rank == 1:
            _until((Path(arguments["folder"]) / "take").exists)
            return [pipe.receive() is None for _ in range(4)].count(True)
        pipe.send(torch.zeros(8, dtype=torch.uint8))
        _until(lambda: pipe.queued_bytes == 0)
        for item in (None, torch.zeros(100, dtype=torch.uint8), None):
            pipe.send(item)
        counted = pipe.queued_bytes
        (Path(arguments["folder"]) / "take").touch()
        return counted


def backpressure(rank: int, **arguments: Any) -> dict[str, Any]:
    """Member 0 fills its queue while member 1 takes nothing beyond its first tensor, and again once it does."""
    take = Path(arguments["folder"]) / "take"
    if rank == 1:
        with open_pipe(rank, receive_limit_bytes=0, **arguments) as pipe:
            _until(take.exists)
            return {"received": [pipe.receive().tolist()[0] for _ in range(5)]}  # type: ignore[union-attr]
    with open_pipe(rank, send_limit_bytes=MEBIBYTE, deadline_seconds=3.0, **arguments) as pipe:
        item = torch.zeros(MEBIBYTE, dtype=torch.uint8)
        pipe.send(item)
        _until(lambda: pipe.queued_bytes == 0)
        seen: dict[str, Any] = {"queued": []}
        started = time.monotonic()
        for number in (1, 2):
            # The second finds exactly the limit queued, and passes.
            pipe.send(item + number)
            seen["queued"].append(pipe.queued_bytes)
        seen["seconds"] = time.monotonic() - started
        with ThreadPoolExecutor(1) as threads:
            third = threads.submit(pipe.send, item + 3)
            time.sleep(0.3)
            seen["third_waits"] = not third.done()
            take.touch()
            third.result()
        pipe.send(item + 4)
        _until(lambda: pipe.queued_bytes == 0)
        return seen


def backpressure_deadline(rank: int, **arguments: Any) -> dict[str, Any]:
    """Member 0's queue stays over its limit: send gives up, and what was queued still arrives."""
    take = Path(arguments["folder"]) / "take"
    if rank == 1:
        with open_pipe(rank, receive_limit_bytes=0, **arguments) as pipe:
            _until(take.exists)
            return {"received": [pipe.receive().numel() for _ in range(2)]}  # type: ignore[union-attr]
    pipe = open_pipe(rank, send_limit_bytes=0, **arguments)
    pipe.send(torch.zeros(8, dtype=torch.uint8))
    _until(lambda: pipe.queued_bytes == 0)
    pipe.send(torch.zeros(16, dtype=torch.uint8))
    seen = _raised(lambda: pipe.send(torch.zeros(32, dtype=torch.uint8), timeout_seconds=0.4))
    take.touch()
    pipe.close()
    return seen


def overwrite_source(rank: int, device: str = "cpu", **arguments: Any) -> bool:
    """Member 0 overwrites its tensor as soon as send has returned (on CUDA: launches that)."""
    with open_pipe(rank, device=device, **arguments) as pipe:
        if rank == 0:
            source = torch.empty(4 * MEBIBYTE, dtype=torch.uint8, device=f"cuda:{rank}" if device == "cuda" else "cpu")
            for number in range(10):
                source.fill_(number)
                pipe.send(source)
                source.fill_(255)
            return True
        received = [pipe.receive() for _ in range(10)]
        return all(tensor is not None and bool((tensor == number).all()) for number, tensor in enumerate(received))


def lent_memory(rank: int, device: str = "cpu", **arguments: Any) -> Any:
    """Member 0 writes each item into memory of the pipe, member 1 reads it there; both are used again."""
    limits = {"send_limit_bytes": 2 * MEBIBYTE, "receive_limit_bytes": 2 * MEBIBYTE}
    places: set[int] = set()
    with open_pipe(rank, device=device, **limits, **arguments) as pipe:
        if rank == 0:
            for number in range(40):
                with pipe.sending((1, MEBIBYTE), torch.uint8) as tensor:
                    places.add(tensor.data_ptr())
                    tensor.fill_(number)
            return len(places)
        seen = []
        for number in range(40):
            with pipe.receiving() as received:
                assert received is not None
                places.add(received.data_ptr())
                # Kept as a sum that is made on the current stream: the memory itself is not, after the block.
                seen.append((received == number).all())
        return len(places), all(bool(same) for same in seen)


def close_drains(rank: int, **arguments: Any) -> Any:
    """Member 0 closes with much in its queue; member 1 still gets everything, then the end."""
    pipe = open_pipe(rank, **arguments)
    if rank == 0:
        for number in range(20):
            pipe.send(torch.full((MEBIBYTE,), number, dtype=torch.uint8))
        pipe.close()
        pipe.close()
        seen = [_raised(lambda: pipe.send(None)), _raised(lambda: pipe.receive(0.1))]
        return seen, pipe.queued_bytes, pipe.ready_bytes, _open_sockets()
    received = []
    for _ in range(20):
        time.sleep(0.01)
        tensor = pipe.receive()
        assert tensor is not None
        received.append(int(tensor[-1]))
    end = _raised(pipe.receive)
    pipe.close()
    return received, end


def _open_sockets() -> int:
    # What Gloo has in flight ends by itself, a moment later.
    process = psutil.Process()
    _until(lambda: not process.net_connections(), 5.0)
    return len(process.net_connections())


def refused(rank: int, **arguments: Any) -> Any:
    """Member 1 takes no tensor as large as the one that member 0 sends."""
    if rank == 1:
        pipe = open_pipe(rank, max_tensor_bytes=1000, **arguments)
        seen = [_raised(pipe.receive), _raised(pipe.receive)]
        pipe.close()
        return seen, pipe.ready_bytes
    pipe = open_pipe(rank, **arguments)
    pipe.send(torch.zeros(1001, dtype=torch.uint8))
    _until(lambda: pipe.queued_bytes == 0)
    seen = [_raised(lambda: pipe.send(None)), _raised(pipe.close), _raised(pipe.close)]
    return seen, pipe.queued_bytes


def lose_peer(rank: int, size: int, **arguments: Any) -> Any:
    """Member 1 is killed; member 0 is in the middle of sending much and waits for something to come."""
    pipe = open_pipe(rank, receive_limit_bytes=0, **arguments)
    if rank == 1:
        (Path(arguments["folder"]) / "ready").touch()
        time.sleep(60)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(_raised, lambda: pipe.receive(15))
        for _ in range(8):
            pipe.send(torch.zeros(size, dtype=torch.uint8))
        (Path(arguments["folder"]) / "kill").touch()
        received = waiting.result()
    _until(lambda: pipe.queued_bytes == 0)
    seen = [received, _raised(lambda: pipe.send(None)), _raised(pipe.close)]
    return seen, pipe.queued_bytes, pipe.ready_bytes, _open_sockets()


def receive_deadline(rank: int, **arguments: Any) -> Any:
    """Member 1 gives up, then tries again."""
    with open_pipe(rank, **arguments) as pipe:
        if rank == 0:
            _until((Path(arguments["folder"]) / "gave_up").exists)
            pipe.send(torch.ones(3))
            return None
        started = time.monotonic()
        seen = _raised(lambda: pipe.receive(0.2))
        seconds = time.monotonic() - started
        (Path(arguments["folder"]) / "gave_up").touch()
        received = pipe.receive()
        assert received is not None
        return seen, seconds, received.tolist()


def connect_only(rank: int, delay: float = 0.0, **arguments: Any) -> float:
    """How long making the pipe took, after a delay."""
    time.sleep(delay)
    started = time.monotonic()
    open_pipe(rank, **arguments).close()
    return time.monotonic() - started


def listening_addresses(rank: int, **arguments: Any) -> list[Any]:
    """Where this process listens while the pipe is open."""
    with open_pipe(rank, **arguments) as pipe:
        connections = psutil.Process(os.getpid()).net_connections()
        pipe.send(None)
        pipe.receive()
        return [[entry.laddr.ip, entry.laddr.port] for entry in connections if entry.status == psutil.CONN_LISTEN]
