"""The real operator as a process of its own, against an API server that a test started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tpmodel.local import free_ports

COMMAND = [sys.executable, "-c", "from tpmodel_operator.main import main; main()"]
IMAGE = "registry.example/tpmodel-worker:test"


def wait_for(condition: Callable[[], object], *, seconds: float, what: str) -> float:
    """Waits until the condition holds; returns how long that took."""
    started = time.monotonic()
    while not condition():
        waited = time.monotonic() - started
        assert waited < seconds, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return time.monotonic() - started


@dataclass
class Operator:
    """One operator process."""

    kubeconfig: Path
    log: Path
    name: str = "operator-a"
    arguments: Sequence[str] = ()
    command: Sequence[str] = field(default_factory=lambda: COMMAND)
    environment: dict[str, str] = field(default_factory=dict)

    def start(self) -> Operator:
        """Begins; ready() tells when it leads or waits."""
        self.health_port, self.metrics_port = free_ports(2)
        ports = [f"--health-port={self.health_port}", f"--metrics-port={self.metrics_port}"]
        common = [f"--pod-name={self.name}", f"--default-image={IMAGE}", "--log-format=json", *ports]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*self.command, *common, *self.arguments],
                env=os.environ | {"KUBECONFIG": str(self.kubeconfig)} | self.environment,
                stderr=log,
                stdout=log,
            )
        return self

    def get(self, path: str, *, port: int | None = None) -> tuple[int, str]:
        """An HTTP answer of the health port; 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port or self.health_port}{path}", timeout=2) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""

    def healthy(self) -> bool:
        """Whether the liveness probe passes."""
        return self.get("/healthz")[0] == 200

    def ready(self) -> bool:
        """Whether the readiness probe passes."""
        return self.get("/readyz")[0] == 200

    def metric(self, name: str) -> float:
        """The sum of a metric's values over all labels; 0 where there is none."""
        lines = self.get("/metrics", port=self.metrics_port)[1].splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(values)

    def leads(self) -> bool:
        """Whether it holds the Lease."""
        return self.metric("tpmodel_operator_leader") == 1

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def lines(self) -> str:
        """Its log."""
        return self.log.read_text()


@contextlib.contextmanager
def operating(operator: Operator) -> Iterator[Operator]:
    """An operator that is started, ready, and killed at the end."""
    operator.start()
    try:
        wait_for(operator.ready, seconds=20, what=f"a ready operator\n{operator.lines()}")
        yield operator
    finally:
        if operator.process.poll() is None:
            operator.kill()
