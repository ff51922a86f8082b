"""A request's KV cache from one rank's blocks into another's, against a bare send and receive of the same bytes.

    python -m benchmarks.kv_transfer [--device cpu|cuda] [--tokens 1024,4096]

Two processes, each with what a rank has for handovers. With two GPUs the bytes go over NCCL; with one, both processes
share it and the bytes go through host memory over Gloo, as between ranks of one GPU; without, over Gloo on the CPU.
Prints how long the first handover took, which opens the pipe, and the same one later; then for each length the median
of several rounds, in GB/s.
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
from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.plan import TransferPlan, plan_transfer
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.kv.transfer import RequestCache
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
    parser.add_argument("--member", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    tokens = options.tokens or TOKENS[options.device]
    if options.member is not None:
        lengths = [int(part) for part in tokens.split(",")]
        run_member(options.member, options.device, lengths, options.port)
        return
    port = str(free_ports(1)[0])
    command = [sys.executable, "-m", "benchmarks.kv_transfer", "--device", options.device, "--tokens", tokens]
    members = [
        subprocess.Popen([*command, "--port", port, "--member", str(member)], stdout=subprocess.PIPE, text=True)
        for member in (SENDER, RECEIVER)
    ]
    outputs = [member.communicate()[0] for member in members]
    if any(member.returncode for member in members):
        sys.exit("a member failed")
    print_table(json.loads(outputs[RECEIVER]))


def print_table(result: dict[str, object]) -> None:
    """One line for each length."""
    print(f"{result['layers']} layers, {KV_HEADS} KV heads of {HEAD_DIM}, bfloat16; {result['transport']}")
    print(f"the first handover: {result['first']:.4f} s, the same later: {result['later']:.4f} s")
    print(f"{'tokens':>8} {'MB':>8} {'handover GB/s':>14} {'bare GB/s':>10} {'of bare':>8}")
    rows = result["rows"]
    assert isinstance(rows, list)
    for row in rows:
        handover, bare = row["bytes"] / row["handover"] / 1e9, row["bytes"] / row["bare"] / 1e9
        size = row["bytes"] / 1e6
        print(f"{row['tokens']:>8} {size:>8.1f} {handover:>14.2f} {bare:>10.2f} {handover / bare:>8.0%}")


def run_member(member: int, device_type: str, lengths: list[int], port: int) -> None:
    """One end; the receiver prints what it has measured, as JSON."""
    nccl = device_type == "cuda" and torch.cuda.device_count() > 1
    device = torch.device("cuda", member if nccl else 0) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Threads of torch's own that wait for each other are slow where processors are few.
        torch.set_num_threads(1)
    store = TCPStore(HOST, port, 2, is_master=member == SENDER, timeout=timedelta(seconds=SECONDS))
    dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=member, world_size=2)
    # Barriers over TCP, which launch nothing on a device.
    barriers: Any = dist.new_group(backend="gloo")
    device_ids = ["first", "second"] if nccl else ["", ""]
    measuring = Member(member, device, device_ids, store, barriers, staged=device.type == "cuda" and not nccl)
    with torch.inference_mode():
        # Its tensors' first use of a device, and torch's own first connection, are no part of it.
        first = measuring.first(lengths[0])
        rows = [measuring.measure(tokens) for tokens in lengths]
    dist.barrier(group=barriers)
    measuring.close()
    if member == RECEIVER:
        result = {"layers": LAYERS[device_type], "first": first, "later": rows[0]["handover"], "rows": rows}
        result["transport"] = "NCCL between two GPUs" if nccl else f"Gloo, tensors on {device.type}"
        print(json.dumps(result))
    dist.destroy_process_group()


class Member:
    """One end's caches and rounds."""

    def __init__(
        self, member: int, device: torch.device, device_ids: list[str], store: TCPStore, barriers: Any, *, staged: bool
    ) -> None:
        """staged: bare tensors go through host memory, too."""
        self._member = member
        self._device = device
        self._device_ids = device_ids
        self._store = store
        self._barriers = barriers
        self._staged = staged
        self._number = 0
        self._handovers = Handovers(
            rank=0, device=device, device_id=device_ids[member], address=HOST, token="benchmark"
        )
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

    def close(self) -> None:
        """Ends the pipe."""
        self._handovers.close_pipes("the benchmark is over")
        # Gloo's threads must not be there any more when the process ends.
        self._handovers.join_pipes()

    def first(self, tokens: int) -> float:
        """Seconds of a handover that opens the pipe."""
        cache = self._cache(tokens)
        dist.barrier(group=self._barriers)
        started = time.perf_counter()
        self._hand_over(plan_transfer(self._layout, self._layout), cache)
        return time.perf_counter() - started

    def measure(self, tokens: int) -> dict[str, float]:
        """Seconds of the handover and of the bare way, medians."""
        cache = self._cache(tokens)
        plan = plan_transfer(self._layout, self._layout)
        shape = (2, tokens, KV_HEADS, HEAD_DIM)
        flat = [torch.zeros(shape, dtype=torch.bfloat16, device=self._device) for _ in cache.kv]
        handover = self._time(lambda: self._hand_over(plan, cache))
        bare = self._time(lambda: self._bare(flat))
        return {"tokens": tokens, "bytes": sum(tensor.nbytes for tensor in flat), "handover": handover, "bare": bare}

    def _cache(self, tokens: int) -> RequestCache:
        blocks = -(-tokens // BLOCK)
        shape = (blocks + 1, BLOCK, KV_HEADS, HEAD_DIM)

        def part() -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.bfloat16, device=self._device)

        kv = [LayerKvCache(part(), part()) for _ in range(self._layout.layers)]
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(self._member)).tolist()
        return RequestCache(kv, [], BLOCK, order, 0, tokens)

    def _hand_over(self, plan: TransferPlan, cache: RequestCache) -> None:
        """This end's part, as a rank does it; the offer goes through the store, in the place of the engines."""
        self._number += 1
        key = f"offer/{self._number}"
        request = worker_pb2.KvTransferRequest(transfer=key, deadline_seconds=SECONDS)
        if self._member == SENDER:
            request.send.CopyFrom(worker_pb2.SendKv(device_ids=[self._device_ids[RECEIVER]], world="benchmark"))
            endpoints = self._handovers.send(request, plan, cache)
            self._store.set(key, kv_pb2.KvOffer(endpoints=endpoints).SerializeToString().hex())
        else:
            offer = kv_pb2.KvOffer.FromString(bytes.fromhex(self._store.get(key).decode()))
            request.receive.endpoints.extend(offer.endpoints)
            self._handovers.receive(request, plan, cache)
        handover = self._handovers.find(key)
        assert handover is not None, "it was begun"
        outcome = handover.outcome.result()
        self._handovers.forget(key)
        if outcome.error:
            raise RuntimeError(outcome.error)

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
