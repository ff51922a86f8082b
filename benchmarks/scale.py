"""1,000 TPModels of 4 pods on simulated nodes: how soon their children exist, how soon faults are answered, and what
the operator's process needs.

    python -m benchmarks.scale [--models 1000] [--pods 4] [--faults 200] [--at-once 100] [--foreign 10000]

etcd, kube-apiserver, controller-manager and scheduler are the real ones, nodes and kubelets are kwok's, and the
operator is the process that runs in its image. Two control planes, one after the other: first the floor, where this
program makes the same objects by the same calls with the operator's own client, and nobody watches or decides; then
the operator. A fault is a container that ends with 75; its answer is measured from before the status is written that
says so until the last delete of the gang's pods was accepted, as a watch of the API server tells it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import scale_cluster, scale_load
from benchmarks.scale_cluster import ScaleCluster
from benchmarks.scale_load import PodWatch
from tpmodel.local import free_ports
from tpmodel_operator.kube import MODELS, Kube

NAMESPACE = "scale"
FOREIGN = "foreign"
CREATION_SECONDS = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much of everything."""

    models: int
    pods: int
    faults: int
    at_once: int
    foreign: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was measured, in seconds and MiB."""

    floor: float
    creation: float
    ready: float
    faults: list[float]
    many: float
    faults_in_churn: list[float]
    rss: float
    rss_in_churn: float
    cpu: float

    @property
    def ratio(self) -> float:
        """Creation by the operator over the floor."""
        return self.creation / self.floor


class OperatorProcess:
    """The operator's process and what it has used."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._started = process
        self._process = psutil.Process(process.pid)

    async def ended(self) -> int:
        """Returns its exit code, once it has ended."""
        descriptor = os.pidfd_open(self._started.pid)
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        return self._started.wait()

    def peak_rss(self) -> float:
        """MiB, since its start."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        return int(found.group(1)) / 1024 if found else 0.0

    def cpu_seconds(self) -> float:
        """User and system, since its start."""
        times = self._process.cpu_times()
        return times.user + times.system


def main() -> None:
    """Runs all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("models", 1000), ("pods", 4), ("faults", 200), ("at-once", 100), ("foreign", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    load = Load(**vars(parser.parse_args()))
    print(table(load, measure(load)))


def measure(load: Load) -> Outcome:
    """The floor, then the operator."""
    with scale_cluster.running() as cluster:
        floor = asyncio.run(_floor(cluster, load))
        print(f"floor: {floor:.1f} s", flush=True)
    with scale_cluster.running() as cluster, _operator(cluster) as operator:
        return asyncio.run(_measure_while_it_runs(cluster, operator, load, floor))


async def _measure_while_it_runs(cluster: ScaleCluster, operator: OperatorProcess, load: Load, floor: float) -> Outcome:
    """Raises RuntimeError when the operator ends: nobody starts it again here, and nothing more would happen."""
    measuring = asyncio.create_task(_measure_operator(cluster, operator, load, floor))
    ended = asyncio.create_task(operator.ended())
    await asyncio.wait({measuring, ended}, return_when=asyncio.FIRST_COMPLETED)
    if measuring.done():
        ended.cancel()
        return measuring.result()
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)
    raise RuntimeError(f"the operator ended with exit code {ended.result()}: its last lines say why")


async def _floor(cluster: ScaleCluster, load: Load) -> float:
    async with _client(cluster) as kube:
        await scale_cluster.prepare(kube, pods=load.models * load.pods, namespaces=(NAMESPACE,))
        watching = asyncio.create_task(PodWatch(kube, NAMESPACE).run())
        creation = scale_load.create_models_and_children(kube, NAMESPACE, load.models, load.pods)
        seconds = await _time_to_children(kube, asyncio.create_task(creation), load)
        watching.cancel()
        return seconds


async def _time_to_children(kube: Kube, creating: asyncio.Task[None], load: Load) -> float:
    """Seconds from now until every child exists; both ways of making them are looked at alike."""
    started = time.monotonic()

    async def complete() -> bool:
        if creating.done():
            creating.result()
        return await scale_load.has_children(kube, NAMESPACE, load.models)

    await scale_load.until(complete, seconds=CREATION_SECONDS, what="all children")
    await creating
    return time.monotonic() - started


async def _measure_operator(cluster: ScaleCluster, operator: OperatorProcess, load: Load, floor: float) -> Outcome:
    async with _client(cluster) as kube:
        await scale_cluster.prepare(kube, pods=load.models * load.pods + load.foreign, namespaces=(NAMESPACE, FOREIGN))
        watch = PodWatch(kube, NAMESPACE)
        watching = asyncio.create_task(watch.run())
        await asyncio.sleep(5)  # the operator finds the CRD
        started = time.monotonic()
        creating = asyncio.create_task(scale_load.create_models(kube, NAMESPACE, load.models, load.pods))
        creation = await _time_to_children(kube, creating, load)
        print(f"creation: {creation:.1f} s", flush=True)
        await scale_load.until(lambda: _all_ready(kube, load), seconds=CREATION_SECONDS, what="all Ready", period=1)
        ready = time.monotonic() - started
        print(f"ready: {ready:.1f} s, peak RSS {operator.peak_rss():.0f} MiB", flush=True)
        await asyncio.sleep(10)
        cpu = operator.cpu_seconds()
        models = [f"m-{number}" for number in range(load.models)]
        random.Random(4).shuffle(models)
        faults = [await scale_load.fault(kube, watch, models.pop()) for _ in range(load.faults)]
        print(f"faults: {_spread(faults)}", flush=True)
        many = await _many_faults(kube, watch, [models.pop() for _ in range(load.at_once)])
        print(f"{load.at_once} at once: {many:.2f} s", flush=True)
        rss = operator.peak_rss()
        in_churn = await _churned(kube, watch, models, load)
        print(f"faults while others churn: {_spread(in_churn)}", flush=True)
        watching.cancel()
        return Outcome(
            floor=floor,
            creation=creation,
            ready=ready,
            faults=faults,
            many=many,
            faults_in_churn=in_churn,
            rss=rss,
            rss_in_churn=operator.peak_rss(),
            cpu=cpu,
        )


async def _many_faults(kube: Kube, watch: PodWatch, models: list[str]) -> float:
    started = time.monotonic()
    await asyncio.gather(*(scale_load.fault(kube, watch, model) for model in models))
    return time.monotonic() - started


async def _churned(kube: Kube, watch: PodWatch, models: list[str], load: Load) -> list[float]:
    all_there = asyncio.Event()
    churning = asyncio.create_task(scale_load.churn(kube, FOREIGN, load.foreign, ready=all_there))
    await asyncio.wait([churning, asyncio.create_task(all_there.wait())], return_when=asyncio.FIRST_COMPLETED)
    print(f"{load.foreign} foreign pods have come", flush=True)
    faults = []
    for _ in range(min(load.faults, len(models))):
        faults.append(await scale_load.fault(kube, watch, models.pop()))
        await asyncio.sleep(0.1)
    if churning.done():
        churning.result()
    churning.cancel()
    return faults


async def _all_ready(kube: Kube, load: Load) -> bool:
    ready = 0
    async for page in kube.list(MODELS, NAMESPACE):
        ready += sum(item.get("status", {}).get("readyReplicas") == 1 for item in page.items)
    return ready >= load.models


@contextlib.asynccontextmanager
async def _client(cluster: ScaleCluster):
    kube = await cluster.client()
    try:
        yield kube
    finally:
        await kube.close()


@contextlib.contextmanager
def _operator(cluster: ScaleCluster) -> Iterator[OperatorProcess]:
    health, metrics = free_ports(2)
    command = [sys.executable, "-c", "from tpmodel_operator.main import main; main()"]
    command += [f"--default-image={scale_load.IMAGE}", "--log-format=json"]
    command += [f"--health-port={health}", f"--metrics-port={metrics}"]
    log = cluster.folder / "operator.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=os.environ | {"KUBECONFIG": str(cluster.kubeconfig)}, stdout=output, stderr=output
        )
    try:
        yield OperatorProcess(process)
    except BaseException:
        print(log.read_text()[-4000:])
        raise
    finally:
        process.kill()
        process.wait()


def percentile(values: list[float], share: float) -> float:
    """The value that so large a share of all does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _spread(values: list[float]) -> str:
    return f"p50 {statistics.median(values):.3f} s, p99 {percentile(values, 0.99):.3f} s, max {max(values):.3f} s"


def table(load: Load, outcome: Outcome) -> str:
    """What was measured, beside what is wanted at 1,000 models."""
    rows = [
        ("the same objects, same client, no operator", f"{outcome.floor:.1f} s", ""),
        (
            "first TPModel created to last child made",
            f"{outcome.creation:.1f} s, {outcome.ratio:.2f}x the floor",
            "1.5x, 240 s",
        ),
        ("... to all TPModels Ready", f"{outcome.ready:.1f} s", ""),
        (f"single fault, {len(outcome.faults)} times", _spread(outcome.faults), "p99 1 s"),
        (f"{load.at_once} gangs at once, to the last delete", f"{outcome.many:.2f} s", "10 s"),
        (f"single fault while {load.foreign} foreign pods churn", _spread(outcome.faults_in_churn), ""),
        ("operator's peak RSS", f"{outcome.rss:.0f} MiB", "300 MiB"),
        ("... while foreign pods churn", f"{outcome.rss_in_churn:.0f} MiB", "300 MiB"),
        ("operator's CPU until all Ready", f"{outcome.cpu:.0f} s", ""),
    ]
    conditions = (
        f"{load.models} TPModels of {load.pods} pods, {os.cpu_count()} cores ({platform.machine()}) for everything: "
        "etcd, kube-apiserver, controller-manager, scheduler, kwok, operator and this client; "
        f"controller-manager and scheduler with {scale_cluster.QPS} QPS, the former with only the controllers for "
        "StatefulSets, garbage, namespaces and disruptions"
    )
    lines = [
        conditions,
        "",
        "| what | measured | wanted |",
        "| --- | --- | --- |",
        *(f"| {what} | {measured} | {wanted} |" for what, measured, wanted in rows),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
