"""One run of the chaos suite: load, a fault after the other, and what must hold after each."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from support.chaos_faults import Fault, schedule
from support.chaos_load import Load
from support.chaos_server import ChaosServer, Footprint
from tpmodel import Client, TpmodelError

_FLOW_SECONDS = 120.0
_IDLE_SECONDS = 30.0
# Connections of gRPC come and go by themselves.
_MORE_DESCRIPTORS = 8
# Between two looks at what is held.
_FAULTS_BETWEEN_LOOKS = 10


@dataclass(slots=True)
class Times:
    """Seconds, of every fault of a kind."""

    serving: list[float] = field(default_factory=list)
    """From the fault to a world that serves."""
    tokens: list[float] = field(default_factory=list)
    """From the fault to a new token in every lane."""


class Chaos:
    """Faults under load, with everything that must hold checked after each."""

    def __init__(self, server: ChaosServer, load: Load, *, seed: int) -> None:
        self._server = server
        self._load = load
        self._rng = random.Random(seed)
        self._baseline: Footprint | None = None
        self.times: dict[str, Times] = {}

    def run(self, count: int) -> None:
        """Prepares, injects that many faults, and looks for what was left behind now and then and at the end."""
        server, load = self._server, self._load
        server.start()
        server.wait_serving()
        load.learn()
        load.start()
        self._flow(time.monotonic())
        self._look()
        for index, fault in enumerate(schedule(self._rng, count, respawn=server.settings.respawn)):
            if index and index % _FAULTS_BETWEEN_LOOKS == 0:
                self._look()
            # Faults at random moments of the streams' lives.
            time.sleep(self._rng.uniform(0.0, 0.5))
            try:
                self._inject(fault)
            except BaseException:
                print(f"fault {index}: {fault.name}\n{server.tail(120)}", flush=True)
                raise
        self._look(again=False)
        assert load.tally.whole > count / 4, load.tally
        assert server.stop() == 0

    def _inject(self, fault: Fault) -> None:
        server, times = self._server, self.times.setdefault(fault.name, Times())
        server.status()
        before, started = server.epoch, time.monotonic()
        fault.inject(server, self._rng)
        if fault.breaks != "nothing":
            server.wait_serving(after=before if fault.breaks == "world" else 0)
        times.serving.append(time.monotonic() - started)
        self._flow(time.monotonic())
        times.tokens.append(time.monotonic() - started)
        self._load.check()
        print(f"{fault.name}: every stream goes on after {times.tokens[-1]:.2f} s", flush=True)

    def _flow(self, since: float) -> None:
        """Waits until every stream goes on, and the world serves."""
        what = f"tokens in every lane; violations: {self._load.tally.violations}"
        self._server.eventually(lambda: self._load.flows(since), what, _FLOW_SECONDS)

    def _look(self, *, again: bool = True) -> None:
        """With no stream under way: nothing is left of those before, in blocks, processes, arenas, descriptors."""
        server = self._server
        self._load.pause()
        self._load.check()
        server.wait_serving()
        server.eventually(lambda: _idle(server.target), "no block is held by anybody", _IDLE_SECONDS)
        if self._baseline is None:
            self._baseline = server.footprint()
        baseline = self._baseline
        # Descriptors of streams that have just ended, and a spare in the making, take a moment.
        deadline = time.monotonic() + _IDLE_SECONDS
        while left := _left_behind(baseline, server.footprint()):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        if again:
            self._load.start()
            self._flow(time.monotonic())


def _idle(target: str) -> bool:
    with Client(target) as client:
        try:
            load = client.load()
        except TpmodelError:
            return False
    return not (load.running or load.waiting or load.kv_blocks_used)


def _left_behind(before: Footprint, after: Footprint) -> str:
    """What is held beyond what was before; empty: nothing."""
    if after.processes != before.processes:
        return f"processes {after.processes} instead of {before.processes}"
    if after.arenas != before.arenas:
        return f"arenas {after.arenas} instead of {before.arenas}"
    more = {
        name: (count, before.descriptors[name])
        for name, count in after.descriptors.items()
        if count > before.descriptors[name] + _MORE_DESCRIPTORS
    }
    return f"descriptors {more}" if more else ""


def table(times: dict[str, Times]) -> Iterable[str]:
    """Lines for people: median and worst by kind of fault."""
    yield f"{'fault':42} {'n':>4} {'serving again, s':>18} {'every stream, s':>18}"
    for name, of_kind in sorted(times.items()):
        if not of_kind.tokens:
            continue  # the run ended with it
        columns = [
            f"{statistics.median(values):8.2f} {max(values):8.2f}" for values in (of_kind.serving, of_kind.tokens)
        ]
        yield f"{name:42} {len(of_kind.tokens):4} {columns[0]:>18} {columns[1]:>18}"
