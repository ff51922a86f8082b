"""One server of real processes that may be killed as a whole and started again at the same address."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import psutil

from support.chaos_rank import FOLDER, order_file, poison_file
from support.ended import still_running
from tpmodel.local import free_ports
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.settings import ServeSettings

T = TypeVar("T")

WAIT_SECONDS = 180.0
_TESTS = Path(__file__).parents[1]
_PROGRAM = "from support.chaos_server import program; program()"
_ARENA = re.compile(r"^/memfd:tpmodel (.*) \(deleted\)$")
_CHANNEL_OPTIONS = [("grpc.initial_reconnect_backoff_ms", 50), ("grpc.max_reconnect_backoff_ms", 200)]


def program() -> None:
    """What the supervisor's process runs. Argument: settings as JSON."""
    from tpmodel_worker import logs
    from tpmodel_worker.supervisor.entries import EntryPoints
    from tpmodel_worker.supervisor.main import run_supervisor
    from tpmodel_worker.supervisor.terminal import Terminal

    entries = EntryPoints()
    entries = dataclasses.replace(
        entries,
        rank="support.chaos_rank:run_rank",
        spare="support.chaos_rank:run_spare",
        preload=(*entries.preload, "support.chaos_rank"),
    )
    settings = ServeSettings.from_json(sys.argv[1])
    logs.configure("supervisor", settings.log_format)
    on_event = Terminal(settings.log_format).on_event
    sys.exit(asyncio.run(run_supervisor(settings, on_event=on_event, entries=entries)))


@dataclasses.dataclass(frozen=True, slots=True)
class Footprint:
    """What the server's processes hold of the machine; equal before and after faults, once nothing runs."""

    processes: tuple[str, ...]
    """Names, sorted."""
    arenas: tuple[str, ...]
    """Those whose descriptors the supervisor holds, sorted."""
    descriptors: dict[str, int]
    """Open ones, by process."""


class ChaosServer:
    """One `tpmodel serve` in mode InPlace, over its supervisors' lives."""

    def __init__(self, folder: Path, checkpoint: Path, *, tp: int, **changes: Any) -> None:
        """changes: to the settings."""
        self.folder = folder
        self._runtime = tempfile.TemporaryDirectory(prefix="chaos-", dir="/tmp")
        port, http, control, health, metrics = free_ports(5)
        settings = ServeSettings(
            model_path=str(checkpoint),
            model_id="chaos",
            served_name="chaos",
            dtype="float32",
            world_size=tp,
            port=port,
            http_port=http,
            control_port=control,
            health_port=health,
            metrics_port=metrics,
            runtime_dir=self._runtime.name,
            log_format="text",
            recovery_mode="InPlace",
        )
        self.settings = dataclasses.replace(settings, **changes)
        self.target = f"127.0.0.1:{port}"
        self.epoch = 0
        """The highest that this supervisor's life has shown."""
        self.process: psutil.Popen | None = None
        self._lives = 0
        self._channel = grpc.insecure_channel(f"127.0.0.1:{health}", options=_CHANNEL_OPTIONS)
        self._stub = worker_pb2_grpc.StatusServiceStub(self._channel)

    # ---------------------------------------------------------------------------------------- its life

    def start(self) -> None:
        """Starts a supervisor."""
        self._lives += 1
        self.epoch = 0
        environment = os.environ | {FOLDER: str(self.folder), "PYTHONPATH": str(_TESTS)}
        with self._output_file.open("wb") as output:
            self.process = psutil.Popen(
                [sys.executable, "-c", _PROGRAM, self.settings.to_json()],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )

    def kill(self) -> None:
        """SIGKILLs the supervisor; fails if anything of it is left a few seconds later."""
        descendants = self._process.children(recursive=True)
        self._process.kill()
        self._process.wait(10)
        left = still_running(descendants, 5)
        assert left == [], f"outlived the supervisor: {left}"

    def stop(self) -> int:
        """Drains; the exit code."""
        self._process.terminate()
        return self._process.wait(30)

    def close(self) -> None:
        """Ends whatever is left."""
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self._channel.close()
        self._runtime.cleanup()

    @property
    def _process(self) -> psutil.Popen:
        assert self.process is not None
        return self.process

    @property
    def _output_file(self) -> Path:
        return self.folder / f"output-{self._lives}"

    @property
    def output(self) -> str:
        """What this supervisor's life has printed."""
        return self._output_file.read_text(errors="replace")

    # ------------------------------------------------------------------------------------------- views

    def status(self) -> worker_pb2.GangStatusResponse:
        """Asked on the health port; notes the epoch, which never falls in a supervisor's life."""
        status = self._ask()
        # A new engine shows none before its first world.
        if status.engine.epoch:
            assert status.engine.epoch >= self.epoch, f"epoch {status.engine.epoch} after {self.epoch}"
            self.epoch = status.engine.epoch
        return status

    def _ask(self) -> worker_pb2.GangStatusResponse:
        """Waits for a supervisor that has just been started."""
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                return self._stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=2, wait_for_ready=True)
            except grpc.RpcError as error:
                if self._process.poll() is not None:
                    raise AssertionError(f"the supervisor ended: {self._process.returncode}\n{self.tail()}") from error
                if time.monotonic() > deadline:
                    raise

    @property
    def phase(self) -> str:
        """Such as "serving"."""
        return worker_pb2.Phase.Name(self.status().engine.phase).removeprefix("PHASE_").lower()

    def pids(self) -> dict[str, int]:
        """Of the live processes, by name."""
        return {process.name: process.pid for process in self.status().processes if process.state != "exited"}

    def eventually(
        self, condition: Callable[[], T], what: str, seconds: float = WAIT_SECONDS, every: float = 0.02
    ) -> T:
        """Waits until the condition holds, and returns its value; fails at once where the supervisor has ended."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            if self._process.poll() is not None:
                raise AssertionError(f"the supervisor ended with {self._process.returncode}\n{self.tail()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {seconds:.0f} s: {what}\n{self.tail()}")
            time.sleep(every)
        return value

    def wait_serving(self, *, after: int = 0) -> None:
        """Waits until the world serves, at an epoch above the given one."""
        self.eventually(lambda: self.phase == "serving" and self.epoch > after, f"serving above epoch {after}")

    def tail(self, lines: int = 60) -> str:
        """The last lines of the output."""
        return "\n".join(self.output.splitlines()[-lines:])

    def footprint(self) -> Footprint:
        """What is held now."""
        named = self.pids()
        descriptors = {name: psutil.Process(pid).num_fds() for name, pid in named.items()}
        descriptors["supervisor"] = self._process.num_fds()
        return Footprint(tuple(sorted(named)), tuple(sorted(arenas_of(self._process.pid))), descriptors)

    # ------------------------------------------------------------------------------------------- harm

    def poison(self, token: int) -> None:
        """From now on the ranks die of every sequence that has this token."""
        poison_file(self.folder).write_text(str(token))

    def order(self, rank: int, what: str) -> Path:
        """Has a rank do something to itself at its next step; the file is gone once it has."""
        path = order_file(self.folder, rank)
        new = path.with_suffix(".new")
        new.write_text(what)
        new.rename(path)
        return path


def arenas_of(pid: int) -> dict[str, Path]:
    """The arenas that a process holds descriptors of, by name, with a path that opens each."""
    found: dict[str, Path] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = _ARENA.match(str(entry.readlink()))
        except FileNotFoundError:
            continue  # closed since the listing
        if match is not None:
            found[match[1]] = entry
    return found
