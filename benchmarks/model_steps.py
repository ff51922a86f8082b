"""Milliseconds of decode and prefill steps at published models' shapes, beside transformers and the floor.

    python -m benchmarks.model_steps --shape qwen3-30b-a3b
    python -m benchmarks.model_steps --shape qwen3-next-80b-a3b --layers 24
    python -m benchmarks.model_steps --shape qwen3-next-80b-a3b --only-rank-of 4
    python -m benchmarks.model_steps --shape qwen3.5-27b --tp 4

Dummy weights in bfloat16, made on the device; eager. --tp N starts a process for each of N devices. transformers runs
the same shape on as many devices after ours is gone, cut as its own tensor-parallel plan says; each of its ranks makes
the whole model first. --only-rank-of N computes rank 0's shard of a world of N in one process, without a peer; what the
others would send is left out, and so are the collectives' times. To try the program: --shape small --device cpu.

Floor: a decode's bytes (weights, of the experts those that uniform routing meets, states twice, KV once) at the
device's measured copy bandwidth; a prefill's products at its measured matrix rate, if that takes longer.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.queues import SimpleQueue

import torch
import torch.distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.spawn import spawn

from benchmarks.own_steps import OnlyRank, OwnSteps
from benchmarks.peer_steps import PeerSteps, join_peer_world
from benchmarks.published_shapes import SHAPES, shape_of
from benchmarks.step_floor import StepFloor
from tpmodel.local import free_ports
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.comm.single import SingleCommunicator

ROUNDS = 3
Measured = tuple[list[float], list[float]]
"""Seconds of every case, and their floors."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row."""

    kind: str
    size: int
    """Sequences that decode, or tokens of a prompt."""

    def seconds(self, steps: OwnSteps | PeerSteps, arguments: argparse.Namespace) -> float:
        """The middle one of some rounds; a round before them compiles and fills caches."""
        times = [self._measure(steps, arguments) for _ in range(1 + ROUNDS)]
        return statistics.median(times[1:])

    def _measure(self, steps: OwnSteps | PeerSteps, arguments: argparse.Namespace) -> float:
        if self.kind == "decode":
            return steps.decode(self.size, arguments.context, steps=arguments.steps)
        return steps.prefill(self.size)

    def floor(self, floor: StepFloor, arguments: argparse.Namespace) -> float:
        """Seconds."""
        return floor.decode(self.size, arguments.context) if self.kind == "decode" else floor.prefill(self.size)


def cases(arguments: argparse.Namespace) -> list[Case]:
    """All rows."""
    return [Case("decode", size) for size in arguments.batch] + [Case("prefill", size) for size in arguments.prompt]


def measure_own(communicator: Communicator, arguments: argparse.Namespace) -> Measured:
    """Seconds of every case, and their floors."""
    started = time.perf_counter()
    own = OwnSteps(
        shape_of(arguments.shape, layers=arguments.layers),
        communicator,
        dtype=getattr(torch, arguments.dtype),
        max_seqs=max(arguments.batch),
        max_tokens=max(max(arguments.batch) * (arguments.context + arguments.steps + 32), max(arguments.prompt) + 16),
        step_tokens=max(arguments.prompt),
        expert_parallel=arguments.expert_parallel,
    )
    floor = StepFloor(own, getattr(torch, arguments.dtype))
    if communicator.rank == 0:
        print(
            f"made in {time.perf_counter() - started:.1f} s; copies {floor.bandwidth / 1e12:.2f} TB/s, "
            f"products {floor.products / 1e12:.0f} TFLOP/s",
            flush=True,
        )
    seconds = []
    for case in cases(arguments):
        seconds.append(case.seconds(own, arguments))
        if communicator.rank == 0:
            print(f"tpmodel {case.kind} {case.size}: {1000 * seconds[-1]:.2f} ms", flush=True)
    return seconds, [case.floor(floor, arguments) for case in cases(arguments)]


def measure_peer(device: torch.device, mesh: DeviceMesh | None, arguments: argparse.Namespace) -> list[float]:
    """Seconds of every case in transformers; not a number where its memory does not suffice."""
    shape = shape_of(arguments.shape, layers=arguments.layers)
    peer = PeerSteps(shape, dtype=getattr(torch, arguments.dtype), device=device, mesh=mesh)
    speaks = mesh is None or mesh.get_rank() == 0
    seconds = []
    for case in cases(arguments):
        try:
            seconds.append(case.seconds(peer, arguments))
        except torch.OutOfMemoryError as error:
            print(f"transformers: {str(error).splitlines()[0]}", flush=True)
            seconds.append(float("nan"))
        if speaks:
            print(f"transformers {case.kind} {case.size}: {1000 * seconds[-1]:.2f} ms", flush=True)
    return seconds


def run_own_rank(rank: int, store_port: int, results: SimpleQueue[Measured], arguments: argparse.Namespace) -> None:
    """One process of tpmodel's world; rank 0 gives the results."""
    device = device_of(rank, arguments)
    spec = CommunicatorSpec(
        epoch=1,
        rank=rank,
        world_size=arguments.tp,
        rendezvous=f"127.0.0.1:{store_port}",
        rendezvous_id="benchmark",
        timeout_seconds=60.0,
        pods=["local"] * arguments.tp,
        # Ranks on CPUs have no supervisor here that would keep their shared memory.
        kind="nccl" if device.type == "cuda" else "gloo",
    )
    communicator = build_communicator(spec, device=device, arenas=None)
    measured = measure_own(communicator, arguments)
    if rank == 0:
        results.put(measured)
    communicator.close()


def run_peer_rank(rank: int, store_port: int, results: SimpleQueue[list[float]], arguments: argparse.Namespace) -> None:
    """One process of transformers' world; rank 0 gives the results."""
    device = device_of(rank, arguments)
    mesh = join_peer_world(rank, arguments.tp, store_port, device)
    seconds = measure_peer(device, mesh, arguments)
    if rank == 0:
        results.put(seconds)
    torch.distributed.destroy_process_group()


def device_of(rank: int, arguments: argparse.Namespace) -> torch.device:
    """The rank's own, made the current one."""
    if arguments.device != "cuda":
        return torch.device(arguments.device)
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def measure_worlds(arguments: argparse.Namespace) -> tuple[Measured, list[float] | None]:
    """Of --tp N: our ranks first, then transformers'."""
    own: SimpleQueue[Measured] = get_context("spawn").SimpleQueue()
    store = start_store("127.0.0.1")
    spawn(run_own_rank, (store.port, own, arguments), nprocs=arguments.tp)
    measured = own.get()
    if arguments.no_peer:
        return measured, None
    peer: SimpleQueue[list[float]] = get_context("spawn").SimpleQueue()
    # Rank 0 of transformers starts its store itself.
    (store_port,) = free_ports(1)
    spawn(run_peer_rank, (store_port, peer, arguments), nprocs=arguments.tp)
    return measured, peer.get()


def measure_alone(arguments: argparse.Namespace) -> tuple[Measured, list[float] | None]:
    """Of one process."""
    device = device_of(0, arguments)
    communicator: Communicator = SingleCommunicator(device)
    if arguments.only_rank_of:
        communicator = OnlyRank(arguments.only_rank_of, device)
    measured = measure_own(communicator, arguments)
    if arguments.only_rank_of or arguments.no_peer:
        return measured, None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return measured, measure_peer(device, None, arguments)


def print_table(arguments: argparse.Namespace, own: list[float], floors: list[float], peer: list[float] | None) -> None:
    """Markdown."""
    where = f"tp {arguments.tp}"
    if arguments.only_rank_of:
        where = f"rank 0 of {arguments.only_rank_of} alone, no collectives"
    if arguments.expert_parallel:
        where += ", whole experts"
    layers = f", {arguments.layers} layers" if arguments.layers else ""
    print(f"\n{arguments.shape}{layers}, {where}; decodes at {arguments.context} tokens of context\n")
    print("| step | tpmodel, ms | tokens/s | transformers, ms | times | floor, ms | of the floor |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for index, case in enumerate(cases(arguments)):
        what = f"decode, batch {case.size}" if case.kind == "decode" else f"prefill, {case.size} tokens"
        theirs = "| | |" if peer is None else f"| {1000 * peer[index]:.2f} | {peer[index] / own[index]:.1f} |"
        print(
            f"| {what} | {1000 * own[index]:.2f} | {case.size / own[index]:.0f} {theirs} "
            f"{1000 * floors[index]:.2f} | {own[index] / floors[index]:.1f} |"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--layers", type=int, default=0, help="fewer than published; 0: all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--context", type=int, default=512, help="tokens of each sequence that decodes")
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a round")
    parser.add_argument("--expert-parallel", action="store_true", help="ranks hold whole experts")
    parser.add_argument("--no-peer", action="store_true", help="without transformers")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    worlds = parser.add_mutually_exclusive_group()
    worlds.add_argument("--tp", type=int, default=1)
    worlds.add_argument("--only-rank-of", type=int, default=0, metavar="N")
    return parser.parse_args()


def main() -> None:
    """Prints the table."""
    arguments = parse_arguments()
    (seconds, floors), peer = measure_worlds(arguments) if arguments.tp > 1 else measure_alone(arguments)
    print_table(arguments, seconds, floors, peer)


if __name__ == "__main__":
    main()
