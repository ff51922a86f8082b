"""What a failed test leaves for its reader: objects, events and logs, in a folder."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

from .kubectl import Kubectl, KubectlError
from .local import LocalCluster

KINDS = ("tpmodels", "statefulsets", "pods", "services", "configmaps", "poddisruptionbudgets", "deployments", "leases")
LOG_LINES = 2000


def collect(kubectl: Kubectl, folder: Path, *, cluster: LocalCluster | None = None) -> Path:
    """Writes everything that may explain a failure; what cannot be read is left out and noted."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder / "events.txt", kubectl, "get", "events", "--all-namespaces", "--sort-by=.lastTimestamp")
    _write(folder / "nodes.txt", kubectl, "describe", "nodes")
    for kind in KINDS:
        _write(folder / f"{kind}.yaml", kubectl, "get", kind, "--all-namespaces", "--output=yaml")
    with contextlib.suppress(KubectlError):
        for pod in kubectl.list("pods", everywhere=True):
            _pod(folder / "pods", kubectl, pod["metadata"]["namespace"], pod["metadata"]["name"])
    if cluster is not None:
        _components(folder / "components", cluster)
    return folder


def _pod(folder: Path, kubectl: Kubectl, namespace: str, name: str) -> None:
    within = kubectl.within(namespace)
    lines = f"--tail={LOG_LINES}"
    _write(folder / f"{namespace}.{name}.log", within, "logs", name, "--all-containers", "--prefix", lines)
    _write(folder / f"{namespace}.{name}.previous.log", within, "logs", name, "--all-containers", "--previous", lines)


def _components(folder: Path, cluster: LocalCluster) -> None:
    folder.mkdir()
    for log in [*cluster.folder.glob("*.log"), *cluster.folder.glob("nodes/*/*.log")]:
        name = re.sub(r"[^a-z0-9.-]+", ".", str(log.relative_to(cluster.folder)))
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        (folder / name).write_text("\n".join(lines))


def _write(path: Path, kubectl: Kubectl, *arguments: str) -> None:
    try:
        text = kubectl.run(*arguments)
    except KubectlError as error:
        # No previous container, an API that is not installed, a node that does not answer.
        text = json.dumps({"not read": error.output})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
