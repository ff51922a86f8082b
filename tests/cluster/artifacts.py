"""The cluster's own logs, for whoever looks into a failed test."""

from __future__ import annotations

from pathlib import Path

from .local import LocalCluster

LINES = 2000


def collect_logs(cluster: LocalCluster, folder: Path) -> None:
    """Copies the ends of all components' logs."""
    folder.mkdir(parents=True, exist_ok=True)
    for daemon in cluster.daemons():
        if daemon.log.exists():
            name = daemon.log.name if daemon.folder == cluster.folder else f"{daemon.folder.name}.{daemon.log.name}"
            (folder / name).write_text("\n".join(daemon.log.read_text(errors="replace").splitlines()[-LINES:]))
