"""How fast a trainer's weights reach the ranks, beside a bare broadcast, and how long a stream waits meanwhile.

    python -m benchmarks.weight_updates [--tp 2] [--device cuda] [--shape 8b] [--rounds 3]

A server with dummy weights of that shape, and this program as its trainer, with weights of the same shape. In every
round and in turn: a bare broadcast of as many bytes between as many processes, over the same backend and without any
copies (in processes of their own, on the ranks' devices); then an update packed, unpacked and indexed, in place, and
one packed in shadow. A stream runs all the time. On GPUs each member has one of its own, the trainer the last; with
--share-devices all members share the GPUs that there are, over Gloo. On CPU the shape is smaller unless one is named.
Medians, bytes as sent.

Behind the table: what the time of an update went into, as the server's metrics have it, for the first one of a way and
for the later ones. The first long prompt of a server's life is made twice before the first update, since a stream that
goes on with new weights is such a prompt; --cold leaves that out, so that the first update shows what it costs.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import re
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_checkpoint import default_config, write_dummy_checkpoint
from tpmodel import Client, TpmodelError
from tpmodel.local import LocalServer
from tpmodel.trainer import Trainer, UpdateOptions, connect
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.member import GroupMember, default_backend
from tpmodel_worker.weights.packing import DTYPES

HOST = "127.0.0.1"
TOKEN = "benchmark"
SECONDS = 300.0
LONG_PROMPT = 1500
_PHASES = "tpmodel_weight_update_phase_seconds"
SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "small": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
    },
}
WAYS: dict[str, dict[str, Any]] = {
    "packed": {},
    "unpacked": {"packed": False},
    "indexed": {"transport": "indexed"},
    "packed, shadow": {"mode": "shadow"},
}


@dataclass
class Measured:
    """Of one way, one entry a round."""

    transfer: list[float] = field(default_factory=list)
    """Seconds from the first tensor to the arrival of the last."""
    update: list[float] = field(default_factory=list)
    """Seconds from start to the end of finish."""
    pause: list[float] = field(default_factory=list)
    """Longest time between two pieces of the stream, seconds."""
    phases: list[dict[str, float]] = field(default_factory=list)
    """Seconds of each part, as the server measures them."""


class Stream:
    """Endless requests, one after the other, and when their tokens came."""

    def __init__(self, target: str) -> None:
        self.arrivals: list[float] = []
        self.error: TpmodelError | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(target,), daemon=True)
        self._thread.start()

    def _run(self, target: str) -> None:
        with Client(target) as client:
            while not self._over.is_set():
                try:
                    stream = client.generate([5, 6, 7], max_tokens=2000, temperature=0, ignore_eos=True)
                    for _ in stream:
                        self.arrivals.append(time.perf_counter())
                        if self._over.is_set():
                            stream.cancel()
                            break
                except TpmodelError as error:
                    self.error = error
                    return

    def longest_wait(self, since: float, until: float) -> float:
        """Between two arrivals of which one lies in that time."""
        known = [arrival for arrival in self.arrivals if since - 60 <= arrival]
        gaps = [(early, late) for early, late in itertools.pairwise(known) if late >= since and early <= until]
        return max((late - early for early, late in gaps), default=0.0)

    def end(self) -> None:
        """Sends no further request."""
        self._over.set()
        self._thread.join(60)


def bare_member(rank: int, size: int, port: int, device_name: str, backend: str, chunk: int, orders: Any) -> None:
    """Takes part in bare broadcasts: for every number of bytes that comes over the pipe, once. 0 ends it.

    Nothing waits on a device meanwhile.
    """
    device = torch.device(device_name)
    member = GroupMember(
        master_address=HOST,
        master_port=port,
        rank=rank,
        size=size,
        device=device,
        address=HOST,
        backend=backend,
        timeout_seconds=SECONDS,
        deadline_seconds=SECONDS,
    )
    group = join_update_group(member, key=TOKEN)
    buffer = torch.empty(chunk, dtype=torch.uint8, device=device)
    while total := orders.recv():
        group.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left = total
        while left > 0:
            group.broadcast(buffer[: min(left, chunk)], 0)
            left -= chunk
        # The last receiver has everything.
        group.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        orders.send(time.perf_counter() - started)
    group.close()


class Bare:
    """Processes that broadcast among themselves."""

    def __init__(self, devices: Sequence[str], backend: str, chunk: int) -> None:
        """devices: the trainer's first."""
        context = multiprocessing.get_context("spawn")
        self._store = start_store(HOST)
        pipes = [context.Pipe() for _ in devices]
        self._pipes = [own for own, _ in pipes]
        self._processes = [
            context.Process(
                target=bare_member,
                args=(rank, len(devices), self._store.port, device, backend, chunk, other),
                daemon=True,
            )
            for rank, (device, (_, other)) in enumerate(zip(devices, pipes, strict=True))
        ]
        for process in self._processes:
            process.start()

    def seconds(self, total: int) -> float:
        """One broadcast of so many bytes."""
        self._order(total)
        if not all(pipe.poll(SECONDS) for pipe in self._pipes):
            raise TimeoutError("the bare broadcast does not end")
        return max(pipe.recv() for pipe in self._pipes)

    def _order(self, total: int) -> None:
        for pipe in self._pipes:
            pipe.send(total)

    def end(self) -> None:
        """Ends the processes."""
        self._order(0)
        for process in self._processes:
            process.join(30)


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A checkpoint of the shape, without weights."""
    config = default_config()
    config |= shape | {"dtype": "bfloat16", "max_position_embeddings": 4096, "tie_word_embeddings": False}
    # Of the default model, for as many layers as that has.
    config.pop("layer_types", None)
    write_dummy_checkpoint(folder, config)


def make_weights(trainer: Trainer, device: torch.device) -> dict[str, torch.Tensor]:
    """A full set that would do as a model: small numbers around what norms have."""
    weights: dict[str, torch.Tensor] = {}
    for name, info in trainer.parameters.items():
        if info.tied:
            continue
        tensor = torch.empty(tuple(info.shape), dtype=DTYPES[info.dtype], device=device)
        weights[name] = tensor.fill_(1.0) if len(info.shape) == 1 else tensor.normal_(0.0, 0.02)
    return weights


def phase_seconds(server: LocalServer) -> dict[str, float]:
    """Of all updates so far, by part."""
    with urllib.request.urlopen(server.metrics_url, timeout=SECONDS) as reply:
        found = re.findall(rf'^{_PHASES}_sum{{phase="(\w+)"}} (\S+)$', reply.read().decode(), re.MULTILINE)
    return {name: float(seconds) for name, seconds in found}


def long_prompts(server: LocalServer) -> None:
    """What the first long prompt costs, and the second: no two begin alike."""
    with Client(server.target) as client:
        for number, which in enumerate(("first", "second")):
            prompt = [(7 * place + 13 * number) % 1000 + 10 for place in range(LONG_PROMPT)]
            started = time.perf_counter()
            client.complete(prompt, max_tokens=1, temperature=0, ignore_eos=True)
            seconds = time.perf_counter() - started
            print(f"the {which} prompt of {LONG_PROMPT} tokens, beside the stream: {seconds:.3f} s", flush=True)


def run_update(
    server: LocalServer, stream: Stream, weights: dict[str, torch.Tensor], options: dict[str, Any], measured: Measured,
    version: int,
) -> None:  # fmt: skip
    """One update; the joining is not counted."""
    before = phase_seconds(server)
    with connect(server.control_target, token=TOKEN, options=UpdateOptions(**options)) as trainer:
        begun = time.perf_counter()
        with trainer.update(version) as update:
            started = time.perf_counter()
            update.send(weights)
            measured.transfer.append(time.perf_counter() - started)
        ended = time.perf_counter()
    # The next token shows that the stream goes on.
    deadline = ended + SECONDS
    while (not stream.arrivals or stream.arrivals[-1] <= ended) and stream.error is None:
        if time.perf_counter() > deadline:
            raise TimeoutError("the stream does not go on")
        time.sleep(0.001)
    if stream.error is not None:
        raise stream.error
    after = phase_seconds(server)
    measured.phases.append({name: seconds - before.get(name, 0.0) for name, seconds in after.items()})
    measured.update.append(ended - begun)
    measured.pause.append(stream.longest_wait(begun, ended))


def report(total: int, bare: list[float], ways: dict[str, Measured], names: str) -> None:
    """The table."""
    base = statistics.median(bare)
    print(f"\n{names}: {total / 1e9:.2f} GB, medians of {len(bare)} rounds")
    print(f"{'':18}{'transfer':>10}{'GB/s':>8}{'of bare':>9}{'update':>10}{'pause of a stream':>20}")
    print(f"{'bare broadcast':18}{base:>8.3f} s{total / base / 1e9:>8.2f}{'':>9}{'':>10}{'':>20}")
    for name, measured in ways.items():
        transfer = statistics.median(measured.transfer)
        pause = f"{statistics.median(measured.pause):.3f} s, most {max(measured.pause):.3f} s"
        print(
            f"{name:18}{transfer:>8.3f} s{total / transfer / 1e9:>8.2f}{base / transfer:>9.0%}"
            f"{statistics.median(measured.update):>8.3f} s{pause:>24}"
        )
    print("\nmilliseconds of each part, the first update of the way / the median of the later ones")
    for name, measured in ways.items():
        first, later = measured.phases[0], measured.phases[1:]
        parts = [
            f"{part} {1000 * seconds:.1f}/"
            + (f"{1000 * statistics.median(update.get(part, 0.0) for update in later):.1f}" if later else "-")
            for part, seconds in first.items()
        ]
        print(f"{name}: {', '.join(parts)}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="", help="default: 8b on GPUs, small on CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--buffer-size", type=int, default=1 << 28, help="bytes")
    parser.add_argument("--buffer-count", type=int, default=2)
    parser.add_argument("--share-devices", action="store_true")
    parser.add_argument("--cold", action="store_true", help="no long prompt before the first update")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    count = torch.cuda.device_count() if cuda else 0
    if cuda and not arguments.share_devices and count < arguments.tp + 1:
        parser.error(f"{count} GPUs: {arguments.tp} ranks and the trainer need {arguments.tp + 1}, or --share-devices")
    members = [f"cuda:{rank % count}" if cuda else "cpu" for rank in range(arguments.tp + 1)]
    devices = [members[-1], *members[:-1]]
    backend = "gloo" if arguments.share_devices else default_backend(torch.device(devices[0]))
    shape = SHAPES[arguments.shape or ("8b" if cuda else "small")]
    options = ["--load-format", "dummy", "--dtype", "bfloat16", "--kv-cache-memory", "256M", "--log-format", "json"]
    options += ["--share-devices"] if arguments.share_devices else []
    environment = dict(os.environ)
    if cuda and not arguments.share_devices:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(arguments.tp)))
    with tempfile.TemporaryDirectory(prefix="tpmodel") as name:
        folder = Path(name)
        make_model(folder, shape)
        token = folder / "token"
        token.write_text(TOKEN)
        options += ["--trainer-token-file", str(token)]
        with LocalServer(
            folder, tp=arguments.tp, device=arguments.device, options=options, environment=environment
        ) as server:
            measure(server, arguments, devices, backend)


def measure(server: LocalServer, arguments: argparse.Namespace, devices: Sequence[str], backend: str) -> None:
    """All rounds."""
    common: dict[str, Any] = {
        "device": devices[0],
        "backend": backend,
        "buffer_size": arguments.buffer_size,
        "buffer_count": arguments.buffer_count,
        "join_seconds": SECONDS,
        "deadline_seconds": SECONDS,
    }
    with connect(server.control_target, token=TOKEN, options=common) as trainer:
        weights = make_weights(trainer, torch.device(devices[0]))
    total = sum(tensor.nbytes for tensor in weights.values())
    bare_seconds: list[float] = []
    ways = {name: Measured() for name in arguments.ways}
    stream = Stream(server.target)
    if not arguments.cold:
        long_prompts(server)
    bare = Bare(devices, backend, arguments.buffer_size)
    # Connects, and touches the memory, once.
    bare.seconds(arguments.buffer_size)
    version = 0
    for number in range(arguments.rounds):
        bare_seconds.append(bare.seconds(total))
        for name, measured in ways.items():
            version += 1
            run_update(server, stream, weights, common | WAYS[name], measured, version)
            print(f"round {number + 1}, {name}: {measured.transfer[-1]:.3f} s", flush=True)
    bare.end()
    stream.end()
    names = f"{backend}, trainer on {devices[0]}, {arguments.tp} ranks"
    report(total, bare_seconds, ways, names)


if __name__ == "__main__":
    main()
