"""A request's KV cache from one rank's blocks into another's, against a bare send and receive of the same bytes.

    python -m benchmarks.kv_transfer [--device cpu|cuda] [--tokens 1024,4096] [--piece-bytes N]

Two processes. With two GPUs the bytes go over NCCL; with one, both processes share it and the bytes go through host
memory over Gloo, as between ranks of one GPU; without, over Gloo on the CPU. Prints for each length the median of
several rounds, in GB/s, and how long opening the pipe took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from tpmodel.local import free_ports
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.pipe import KvPipe, KvPipeConfig
from tpmodel_worker.kv.plan import GLOO_PIECE_BYTES, NCCL_PIECE_BYTES, plan_transfer
from tpmodel_worker.kv.transfer import Lane, RequestCache, receive_cache, send_cache
from tpmodel_worker.models.batch import LayerKvCache

SENDER, RECEIVER = 0, 1
ROUNDS = 5
BLOCK = 16
HOST = "127.0.0.1"
SECONDS = 120.0
# Layers, KV heads and head size of a model of 8 billion parameters; on CPU fewer layers.
LAYERS = {"cpu": 12, "cuda": 36}
KV_HEADS, HEAD_DIM = 8, 128
TOKENS = {"cpu": "512,2048", "cuda": "1024,8192,32768"}


def main() -> None:
    """Runs the two members and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", help="lengths of requests, separated by commas")
    parser.add_argument("--piece-bytes", type=int, help="most that is sent at a time; left out: as gangs do")
    parser.add_argument("--member", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ports", help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = options.tokens or TOKENS[options.device]
    if options.member is not None:
        lengths = [int(part) for part in tokens.split(",")]
        run_member(options.member, options.device, lengths, options.ports, options.piece_bytes)
        return
    ports = ",".join(str(port) for port in free_ports(2))
    command = [sys.executable, "-m", "benchmarks.kv_transfer", "--device", options.device, "--tokens", tokens]
    if options.piece_bytes:
        command += ["--piece-bytes", str(options.piece_bytes)]
    members = [
        subprocess.Popen([*command, "--ports", ports, "--member", str(member)], stdout=subprocess.PIPE, text=True)
        for member in (SENDER, RECEIVER)
    ]
    outputs = [member.communicate()[0] for member in members]
    if any(member.returncode for member in members):
        sys.exit("a member failed")
    print_table(json.loads(outputs[RECEIVER]))


def print_table(result: dict[str, object]) -> None:
    """One line for each length."""
    print(
        f"{result['layers']} layers, {KV_HEADS} KV heads of {HEAD_DIM}, bfloat16; {result['transport']}; pieces of"
        f" {result['piece_bytes']} bytes"
    )
    print(f"opening the pipe: {result['connect_seconds']:.3f} s")
    print(f"{'tokens':>8} {'MB':>8} {'handover GB/s':>14} {'bare GB/s':>10} {'of bare':>8}")
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        handover, bare = row["bytes"] / row["handover"] / 1e9, row["bytes"] / row["bare"] / 1e9
        size = row["bytes"] / 1e6
        print(f"{row['tokens']:>8} {size:>8.1f} {handover:>14.2f} {bare:>10.2f} {handover / bare:>8.0%}")


def run_member(member: int, device_type: str, lengths: list[int], ports: str, piece_bytes: int | None) -> None:
    """One end; the receiver prints what it has measured, as JSON."""
    pipe_port, group_port = (int(port) for port in ports.split(","))
    nccl = device_type == "cuda" and torch.cuda.device_count() > 1
    device = torch.device("cuda", member if nccl else 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Threads of torch's own that wait for each other are slow where processors are few.
        torch.set_num_threads(1)
    store = TCPStore(HOST, group_port, 2, is_master=member == SENDER, timeout=timedelta(seconds=SECONDS))
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=member, world_size=2)
    # Barriers over TCP, which launch nothing on a device.
    barriers: Any = dist.new_group(backend="gloo")
    piece_bytes = piece_bytes or (NCCL_PIECE_BYTES if nccl else GLOO_PIECE_BYTES)
    started = time.perf_counter()
    config = KvPipeConfig(
        rank=member,
        address=HOST,
        master_address=HOST,
        base_port=pipe_port,
        token="benchmark",
        device="cuda" if nccl else "cpu",
        local_rank=device.index or 0,
        send_limit_bytes=2 * piece_bytes,
        receive_limit_bytes=2 * piece_bytes,
    )
    result: dict[str, object] = {
        "layers": LAYERS[device_type],
        "piece_bytes": piece_bytes,
        "transport": "NCCL between two GPUs" if nccl else f"Gloo, tensors on {device.type}",
    }
    with KvPipe(config) as pipe, torch.inference_mode():
        result["connect_seconds"] = time.perf_counter() - started
        measuring = Member(member, device, Lane(pipe, piece_bytes), barriers, staged=device.type == "cuda" and not nccl)
        result["rows"] = [measuring.measure(tokens) for tokens in lengths]
        dist.barrier(group=barriers)
    if member == RECEIVER:
        print(json.dumps(result))
    dist.destroy_process_group()


class Member:
    """One end's caches and rounds."""

    def __init__(self, member: int, device: torch.device, lane: Lane[KvPipe], barriers: Any, *, staged: bool) -> None:
        """staged: bare tensors go through host memory, too."""
        self._member = member
        self._device = device
        self._lane = lane
        self._barriers = barriers
        self._staged = staged
        layers = LAYERS[device.type]
        self._layout = KvLayout(
            model_id="benchmark",
            config_digest="",
            dtype="bfloat16",
            layers=layers,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            block_size=BLOCK,
            ranks=1,
        )

    def measure(self, tokens: int) -> dict[str, float]:
        """Seconds of the handover and of the bare way, medians."""
        blocks = -(-tokens // BLOCK)
        shape = (blocks + 1, BLOCK, KV_HEADS, HEAD_DIM)

        def part() -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=self._device)

        kv = [LayerKvCache(part(), part()) for _ in range(self._layout.layers)]
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(self._member)).tolist()
        cache = RequestCache(kv, [], BLOCK, order, 0, tokens)
        plan = plan_transfer(self._layout, self._layout)
        moved = 0

        def hand_over() -> None:
            nonlocal moved
            if self._member == SENDER:
                moved = send_cache(plan, 0, cache, {0: self._lane})
            else:
                moved = receive_cache(plan, 0, cache, {0: self._lane})

        flat = [torch.zeros((2, tokens, KV_HEADS, HEAD_DIM), dtype=torch.bfloat16, device=self._device) for _ in kv]
        handover = self._time(hand_over)
        bare = self._time(lambda: self._bare(flat))
        return {"tokens": tokens, "bytes": moved, "handover": handover, "bare": bare}

    def _bare(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            if self._member == SENDER:
                dist.send(tensor.cpu() if self._staged else tensor, RECEIVER)
            else:
                received = torch.empty(tensor.shape, dtype=tensor.dtype) if self._staged else tensor
                dist.recv(received, SENDER)
                if self._staged:
                    tensor.copy_(received)

    def _time(self, work: Callable[[], None]) -> float:
        seconds: list[float] = []
        for _ in range(ROUNDS + 1):
            dist.barrier(group=self._barriers)
            started = time.perf_counter()
            work()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds.append(time.perf_counter() - started)
        return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
