"""What tests do with a whole local server from outside."""

from __future__ import annotations

import os
import signal
import urllib.request

import psutil

from tpmodel.local import LocalServer


def kill_all(server: LocalServer) -> None:
    """Everything at once: supervisor, engine and ranks, and with them all memory."""
    family = [server.process.pid, *(child.pid for child in psutil.Process(server.process.pid).children(recursive=True))]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    server.process.wait()


def metric(url: str, name: str) -> float:
    """The sum of all samples at a metrics page whose name, and labels if it goes on with them, begin so."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
