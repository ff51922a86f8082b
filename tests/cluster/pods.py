"""Processes inside pods."""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass

from .kubectl import Kubectl

# Runs in the pod, with nothing but Python.
LIST_PROCESSES = """
import json, pathlib
found = []
for folder in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        command = (folder / "cmdline").read_bytes().replace(b"\\0", b" ").decode(errors="replace").strip()
        name = (folder / "comm").read_text().strip()
    except OSError:
        continue
    found.append({"pid": int(folder.name), "name": name, "command": command})
print(json.dumps(found))
"""
KILL = "import os, sys; os.kill(int(sys.argv[1]), int(sys.argv[2]))"


@dataclass(frozen=True)
class PodProcess:
    """A process, as its pod numbers it."""

    pid: int
    name: str
    command: str


def processes(kubectl: Kubectl, pod: str, *, container: str = "") -> list[PodProcess]:
    """What runs in a pod's container, which must have Python."""
    text = kubectl.execute(pod, "python3", "-c", LIST_PROCESSES, container=container)
    return [PodProcess(**found) for found in json.loads(text)]


def kill(
    kubectl: Kubectl, pod: str, process: PodProcess, number: signal.Signals = signal.SIGKILL, *, container: str = ""
) -> None:
    """Sends a signal to a process in a pod, as the pod's user."""
    kubectl.execute(pod, "python3", "-c", KILL, str(process.pid), str(int(number)), container=container)
