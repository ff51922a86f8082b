"""Memory of CPU arenas: a memfd that can neither shrink nor grow, mapped shared."""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path

import torch

from tpmodel_worker.arenas.errors import ArenaMemoryError, ArenaSizeError

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CGROUP = Path("/sys/fs/cgroup")


def rounded_size(size: int) -> int:
    """The least multiple of the page size that holds size bytes."""
    return max(-(-size // mmap.PAGESIZE), 1) * mmap.PAGESIZE


def create_host_memory(what: str, size: int) -> int:
    """Makes sealed memory of size bytes (a multiple of the page size), all zero; returns its descriptor.

    Pages are taken when they are first touched, so free memory is compared beforehand: afterwards
    the kernel could only kill.

    Raises:
        ArenaMemoryError: less than size bytes are free.
    """
    free = free_host_bytes()
    if size > free:
        raise ArenaMemoryError(what, needed_bytes=size, free_bytes=free)
    descriptor = os.memfd_create(f"tpmodel {what}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(descriptor)
        raise ArenaMemoryError(what, needed_bytes=size, free_bytes=free) from error
    return descriptor


def map_host_memory(what: str, descriptor: int, size: int) -> torch.Tensor:
    """Maps the first size bytes of sealed memory as a uint8 tensor; unmapped when its last view is gone.

    Raises:
        ArenaSizeError: the memory is smaller, or is not sealed against shrinking, so that an
            access could raise SIGBUS later.
        ArenaMemoryError: the kernel refused the mapping.
    """
    present = os.fstat(descriptor).st_size
    if present < size:
        raise ArenaSizeError(f"{what}: its manifest says {size} bytes, its descriptor has {present}")
    try:
        sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError as error:
        raise ArenaSizeError(f"{what}: its descriptor is not one of sealed memory") from error
    if not sealed:
        raise ArenaSizeError(f"{what}: its descriptor is not sealed against shrinking")
    try:
        mapping = mmap.mmap(descriptor, size)
    except OSError as error:
        raise ArenaMemoryError(what, needed_bytes=size, free_bytes=free_host_bytes()) from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


def free_host_bytes() -> int:
    """Bytes that this process may still take: of the machine, or of its container where that is less."""
    machine = _field(Path("/proc/meminfo"), "MemAvailable:") * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
    except FileNotFoundError:
        return machine
    if limit == "max":
        return machine
    # The page cache counts as used but is given back on demand.
    cached = _field(_CGROUP / "memory.stat", "active_file") + _field(_CGROUP / "memory.stat", "inactive_file")
    return min(machine, max(int(limit) - used + cached, 0))


def _field(path: Path, name: str) -> int:
    for line in path.read_text().splitlines():
        words = line.split()
        if words[0] == name:
            return int(words[1])
    raise KeyError(f"{path} has no field {name}")
