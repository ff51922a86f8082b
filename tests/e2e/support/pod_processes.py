"""The processes of pods on the local cluster's nodes, as this machine sees and signals them.

For what a pod cannot do to itself: the first process of a container is deaf to SIGKILL and SIGSTOP from inside.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

from tests.cluster.kubectl import Object
from tests.cluster.waiting import wait_until

LISTENS = "0A"
"""TCP_LISTEN, as /proc/net/tcp writes it."""
END_SECONDS = 10.0


def of_container(pod: Object, container: str) -> list[int]:
    """Process ids of everything in a container that runs now."""
    status = next(item for item in pod["status"]["containerStatuses"] if item["name"] == container)
    return _in_group(status["containerID"].rpartition("/")[2])


def first_of(pod: Object, container: str) -> int:
    """The container's main process."""
    inside = of_container(pod, container)
    assert inside, f"nothing runs in container {container} of {pod['metadata']['name']}"
    return next(pid for pid in inside if psutil.Process(pid).ppid() not in inside)


def kill(pid: int) -> None:
    """SIGKILL; returns when the process has ended."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), what=f"end of process {pid}", seconds=END_SECONDS)


def alive(pid: int) -> bool:
    """Whether the process runs or is stopped; a zombie is not alive."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def frozen(pids: Iterable[int]) -> Iterator[None]:
    """The processes are stopped for as long as the block lasts."""
    stopped = list(pids)
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def listening_ports(pid: int) -> set[int]:
    """TCP ports on which this very process listens."""
    sockets = {str(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    ports: set[int] = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENS and f"socket:[{fields[9]}]" in sockets:
                ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def _in_group(name: str) -> list[int]:
    """By control group: the container runtime names it after the container."""
    found: list[int] = []
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if name in Path(f"/proc/{pid}/cgroup").read_text():
                found.append(pid)
    return found
