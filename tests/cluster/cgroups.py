"""Control groups of the cluster's pods, under one folder of every hierarchy (version 1 or 2)."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from . import cache
from .errors import ClusterError

REMOVE_SECONDS = 10.0
CPUSET_FILES = ("cpuset.cpus", "cpuset.mems")


def used() -> list[Path]:
    """The hierarchies in which kubelet wants a group: one for each controller (version 1), else that of version 2."""
    version_1, version_2 = _mounted()
    if not (version_1 or version_2):
        raise ClusterError("no control groups are mounted: kubelet needs them")
    return version_1 or version_2


def _mounted() -> tuple[list[Path], list[Path]]:
    version_1: list[Path] = []
    version_2: list[Path] = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if kind == "cgroup":
            version_1.append(Path(point))
        elif kind == "cgroup2":
            version_2.append(Path(point))
    return version_1, version_2


def create(node: str) -> str:
    """Makes a node's group and returns its name, as kubelet's cgroupRoot wants it."""
    for hierarchy in used():
        group = hierarchy / cache.system_name() / node
        group.mkdir(parents=True, exist_ok=True)
        for made in (group.parent, group):
            _enable(made)
    return f"/{cache.system_name()}/{node}"


def _enable(group: Path) -> None:
    # Version 1: a group without processors and memory nodes takes no process.
    for name in CPUSET_FILES:
        file = group / name
        if file.exists() and not file.read_text().strip():
            file.write_text((group.parent / name).read_text())
    # Version 2: a group's children get a controller only when their parent says so.
    control = group.parent / "cgroup.subtree_control"
    if control.exists() and (group.parent / "cgroup.controllers").exists():
        for controller in (group.parent / "cgroup.controllers").read_text().split():
            with contextlib.suppress(OSError):
                control.write_text(f"+{controller}")


def remove() -> None:
    """Removes all groups of the cluster; their processes must have ended."""
    for group in left():
        _remove_tree(group)


def left() -> list[Path]:
    """Groups that are still there; runc makes some in a version 2 beside version 1 too."""
    groups = [hierarchy / cache.system_name() for mounted in _mounted() for hierarchy in mounted]
    return [group for group in groups if group.exists()]


def _remove_tree(tree: Path) -> None:
    groups = [path for path in tree.rglob("*") if path.is_dir()]
    for group in [*sorted(groups, key=lambda path: len(path.parts), reverse=True), tree]:
        _remove(group)


def _remove(group: Path) -> None:
    """A group whose last process has just been killed is busy for a moment."""
    deadline = time.monotonic() + REMOVE_SECONDS
    while group.exists():
        try:
            group.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                processes = (group / "cgroup.procs").read_text().split()
                raise ClusterError(f"control group {group} cannot be removed; its processes: {processes}") from error
            time.sleep(0.05)
