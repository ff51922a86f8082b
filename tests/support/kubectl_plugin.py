"""`kubectl tpmodel` as users run it: a real kubectl finds the plugin in PATH."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import binaries


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """Commands for one cluster."""

    path: str
    kubeconfig: Path

    @classmethod
    def install(cls, folder: Path, kubeconfig: Path) -> Plugin:
        """Puts the plugin into a folder. PATH has it and kubectl, and nothing else."""
        program = folder / "kubectl-tpmodel"
        program.write_text(f"#!{sys.executable}\nfrom tpmodel.kubectl import main\n\nmain()\n")
        program.chmod(0o755)
        kubectl = binaries.path(binaries.KUBECTL)
        return cls(path=os.pathsep.join([str(folder), str(kubectl.parent)]), kubeconfig=kubeconfig)

    def run(self, *arguments: str, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """To its end, whatever that is."""
        return subprocess.run(
            ["kubectl", "tpmodel", *arguments], env=self._environment, capture_output=True, text=True, timeout=seconds
        )

    @contextmanager
    def running(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """As long as the block lasts; its output is the caller's to read."""
        command = ["kubectl", "tpmodel", *arguments]
        with subprocess.Popen(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                yield process
            finally:
                process.terminate()

    @property
    def _environment(self) -> dict[str, str]:
        return {"PATH": self.path, "KUBECONFIG": str(self.kubeconfig), "HOME": "/nowhere"}
