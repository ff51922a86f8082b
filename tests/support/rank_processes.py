"""Ranks without a model, as real processes: forked from a process that has torch, like a pod's ranks.

`python -m support.rank_processes` is that process. It reads one JSON object per line: which scenario
(a function in support.rank_scenarios, or another module of support) every rank runs, with which arguments.
It writes one per line: which pid a rank has, and what its scenario returned or raised.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

TESTS = Path(__file__).parents[1]
RESULT_SECONDS = 60.0


class RankProcesses:
    """The parent's end; a context manager that leaves no process behind."""

    def __init__(self, scenarios: str = "rank_scenarios") -> None:
        """scenarios: the module of support that has them."""
        paths = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.rank_processes", scenarios],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,
        )
        self._run = 0
        self._pids: dict[tuple[int, int], int] = {}
        self._results: dict[tuple[int, int], dict[str, Any]] = {}
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)

    def start(self, scenario: str, ranks: list[int], **arguments: Any) -> int:
        """Forks one process for each rank, which runs scenario(rank=..., **arguments); returns the run's number."""
        assert self._process.stdin is not None
        self._run += 1
        for rank in ranks:
            order = {"run": self._run, "scenario": scenario, "arguments": {"rank": rank, **arguments}}
            self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._run

    def pid(self, run: int, rank: int) -> int:
        """The process of a rank."""
        self._wait_for(self._pids, (run, rank))
        return self._pids[run, rank]

    def kill(self, run: int, rank: int) -> None:
        """SIGKILLs a rank."""
        os.kill(self.pid(run, rank), signal.SIGKILL)

    def result(self, run: int, rank: int) -> dict[str, Any]:
        """{"value": ...}, or {"error": class name, "message": ...}, or {"signal": ...} when it died."""
        self._wait_for(self._results, (run, rank))
        return self._results[run, rank]

    def finished(self, run: int, rank: int) -> bool:
        """Whether a result has come already."""
        while not self._lines.empty():
            self._take(self._lines.get())
        return (run, rank) in self._results

    def values(self, run: int, ranks: list[int]) -> list[Any]:
        """What the scenario returned, by rank; fails when one did not."""
        results = [self.result(run, rank) for rank in ranks]
        assert all("value" in result for result in results), results
        return [result["value"] for result in results]

    def run(self, scenario: str, world_size: int, **arguments: Any) -> list[Any]:
        """start for all ranks of a world, and values."""
        ranks = list(range(world_size))
        return self.values(self.start(scenario, ranks, world_size=world_size, **arguments), ranks)

    def _wait_for(self, table: dict[tuple[int, int], Any], key: tuple[int, int]) -> None:
        deadline = time.monotonic() + RESULT_SECONDS
        while key not in table:
            self._take(self._lines.get(timeout=max(deadline - time.monotonic(), 0.001)))

    def _take(self, line: dict[str, Any] | None) -> None:
        assert line is not None, "the process that forks ranks is gone"
        if "pid" in line:
            self._pids[line["run"], line["rank"]] = line["pid"]
        else:
            self._results[line["run"], line["rank"]] = line["result"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)


def _main() -> None:
    scenarios = importlib.import_module(f"support.{sys.argv[1]}")
    lock = threading.Lock()

    def say(**values: Any) -> None:
        with lock:
            os.write(1, (json.dumps(values) + "\n").encode())

    def reap(pid: int, reader: int, run: int, rank: int) -> None:
        with os.fdopen(reader) as stream:
            text = stream.read()
        _, status = os.waitpid(pid, 0)
        say(run=run, rank=rank, result=json.loads(text) if text else {"signal": os.WTERMSIG(status)})

    for line in sys.stdin:
        order = json.loads(line)
        run, rank = order["run"], order["arguments"]["rank"]
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            result: dict[str, Any]
            try:
                result = {"value": getattr(scenarios, order["scenario"])(**order["arguments"])}
            except Exception as error:  # noqa: BLE001 (the test judges it)
                result = {"error": type(error).__name__, "message": str(error)}
            os.write(writer, json.dumps(result).encode())
            os._exit(0)
        os.close(writer)
        say(run=run, rank=rank, pid=pid)
        threading.Thread(target=reap, args=(pid, reader, run, rank), daemon=True).start()


if __name__ == "__main__":
    _main()
