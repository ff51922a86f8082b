"""A control group with a limit of memory, of which the kernel kills who goes beyond. Needs root; version 1 or 2."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
_COUNTERS = ("memory.events", "memory.oom_control")
_REMOVE_SECONDS = 10.0


def _hierarchy() -> Path:
    """Where groups of memory are made."""
    found = ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            return Path(point)
        if kind == "cgroup2" and "memory" in (Path(point) / "cgroup.controllers").read_text().split():
            found = point
    assert found, "no control groups of memory are mounted"
    return Path(found)


class MemoryGroup:
    """A context manager. What a process had before it is added counts elsewhere."""

    def __init__(self, limit_bytes: int) -> None:
        hierarchy = _hierarchy()
        self._path = hierarchy / f"tpmodel-test-{os.getpid()}-{random.randrange(16**6):06x}"
        subtree = hierarchy / "cgroup.subtree_control"
        if subtree.exists():
            subtree.write_text("+memory")
        self._path.mkdir()
        (limit,) = (self._path / name for name in _LIMIT_FILES if (self._path / name).exists())
        limit.write_text(str(limit_bytes))
        swap = self._path / "memory.swap.max"
        if swap.exists():
            swap.write_text("0")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Removes the group, once its processes have ended."""
        deadline = time.monotonic() + _REMOVE_SECONDS
        while True:
            try:
                self._path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def add(self, pid: int) -> None:
        """Moves a process with all its threads here."""
        (self._path / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        """Processes of the group that the kernel has killed for want of memory."""
        for name in _COUNTERS:
            file = self._path / name
            if file.exists():
                counts = dict(line.split() for line in file.read_text().splitlines())
                return int(counts["oom_kill"])
        raise AssertionError(f"{self._path} counts no kills")
