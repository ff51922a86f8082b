"""A server on this machine whose processes can be measured one by one, and whose engine can be reached directly."""

from __future__ import annotations

import contextlib
import os
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

from tpmodel.local import LocalServer
from tpmodel_worker.settings import ServeSettings

_SCRAPE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU seconds, user and system, that each kind of process has used."""

    engine: float
    api: float
    """All api processes together."""
    ranks: float
    """All ranks together, with the fork server and the rendezvous, which idle."""

    def since(self, before: CpuTimes) -> CpuTimes:
        """What was used between two measurements."""
        return CpuTimes(self.engine - before.engine, self.api - before.api, self.ranks - before.ranks)


class MeasuredServer:
    """The processes and metrics of a running server."""

    def __init__(self, server: LocalServer, settings: ServeSettings) -> None:
        """settings: with the folder of the server's sockets."""
        self.settings = settings
        self.target = server.target
        self._metrics_url = server.metrics_url
        self._engine: list[psutil.Process] = []
        self._apis: list[psutil.Process] = []
        self._ranks: list[psutil.Process] = []
        for process in psutil.Process(server.process.pid).children():
            command = process.cmdline()
            if "tpmodel_worker.engine" in command:
                self._engine.append(process)
            elif "tpmodel_worker.api" in command:
                self._apis.append(process)
            else:
                self._ranks.append(process)

    def cpu_times(self) -> CpuTimes:
        """CPU seconds since the processes' start."""
        return CpuTimes(*(sum(map(cpu_seconds, group)) for group in (self._engine, self._apis, self._ranks)))

    def metrics(self) -> dict[str, float]:
        """Every sample of /metrics without labels, by name."""
        with urllib.request.urlopen(self._metrics_url, timeout=_SCRAPE_SECONDS) as response:
            text = response.read().decode()
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }


@contextlib.contextmanager
def measured_server(model: Path, *, tp: int, options: Sequence[str]) -> Iterator[MeasuredServer]:
    """Serves the model on CPU ranks until the block ends."""
    # Not TMPDIR: the path of a Unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as folder:
        # Threads of a rank that wait for each other must not keep a core from the engine and the clients.
        environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
        options = [*options, "--runtime-dir", folder]
        server = LocalServer(model, tp=tp, device="cpu", options=options, environment=environment)
        with server:
            (runtime_dir,) = Path(folder).iterdir()
            settings_file = runtime_dir / "settings.json"
            yield MeasuredServer(server, ServeSettings.from_json(settings_file.read_text(encoding="utf-8")))


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and its threads."""
    times = process.cpu_times()
    return times.user + times.system
