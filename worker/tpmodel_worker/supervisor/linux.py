"""The few Linux process calls that Python's standard library lacks. Imports nothing heavy: every child runs it."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.001


class ParentGoneError(Exception):
    """The process that should be this one's parent has ended."""


def _prctl(option: int, argument: int | bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}) failed: {os.strerror(number)}")


def become_subreaper() -> None:
    """Orphans among this process's descendants become its children instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def set_process_name(name: str) -> None:
    """The name that ps and top show; the kernel keeps 15 bytes of it."""
    _prctl(_PR_SET_NAME, name.encode()[:15])


def die_with_parent(parent: int, *, wait_seconds: float = 0.0) -> None:
    """Has the kernel SIGKILL this process when its parent ends, whatever ends it.

    wait_seconds: how long the process may take to become the parent's child (it is an orphan until its
    subreaper adopts it).

    Raises:
        ParentGoneError: the parent is, or has become, another process than `parent`.
    """
    deadline = time.monotonic() + wait_seconds
    while os.getppid() != parent and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Asked after the call: a parent that ended before it would send no signal.
    if os.getppid() != parent:
        raise ParentGoneError(f"process {parent} is not the parent of process {os.getpid()}: it has ended")


def thread_count() -> int:
    """Threads of this process as the kernel counts them, native ones included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Threads:"):
            return int(line.split()[1])
    raise OSError("/proc/self/status has no line Threads:")


def children(parent: int) -> list[int]:
    """Pids of the live (or not yet reaped) children of a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended since the listing
        # "pid (name) state ppid ...": the name may hold spaces and brackets.
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            found.append(int(entry.name))
    return found


def available_cores() -> int:
    """Cores that this process may use: its affinity, within its control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (FileNotFoundError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))
