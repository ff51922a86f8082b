"""What a failed test leaves for whoever looks into it: objects, events and logs, in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.cluster.errors import ClusterError
from tests.cluster.images import ROOT
from tests.cluster.kubectl import Kubectl, Object

FOLDER = ROOT / "build" / "e2e"
KINDS = (
    "tpmodels",
    "statefulsets",
    "pods",
    "configmaps",
    "services",
    "endpointslices",
    "poddisruptionbudgets",
    "networkpolicies",
    "horizontalpodautoscalers",
)


def collect(kubectl: Kubectl, test: str, *, namespaces: list[str]) -> Path:
    """Writes all that may explain a failure; returns the folder. What cannot be had is left out."""
    folder = FOLDER / "".join(letter if letter.isalnum() else "_" for letter in test)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _write(folder / "nodes.txt", lambda: kubectl.run("describe", "nodes"))
    for namespace in namespaces:
        _of_namespace(kubectl.within(namespace), folder / namespace)
    return folder


def _of_namespace(kubectl: Kubectl, folder: Path) -> None:
    folder.mkdir()
    _write(folder / "events.txt", lambda: kubectl.run("get", "events", "--sort-by=.lastTimestamp"))
    _write(folder / "pods.txt", lambda: kubectl.run("describe", "pods"))
    for kind in KINDS:
        _write(folder / f"{kind}.yaml", lambda kind=kind: kubectl.run("get", kind, "--output=yaml"))
    for pod in _pods(kubectl):
        name = pod["metadata"]["name"]
        _write(folder / f"{name}.log", lambda name=name: kubectl.logs(name))
        if any(status["restartCount"] for status in pod["status"].get("containerStatuses", [])):
            _write(folder / f"{name}.previous.log", lambda name=name: kubectl.logs(name, previous=True))


def _pods(kubectl: Kubectl) -> list[Object]:
    try:
        return json.loads(kubectl.run("get", "pods", "--output=json"))["items"]
    except ClusterError:
        return []


def _write(path: Path, read: Callable[[], str]) -> None:
    try:
        text = read()
    except ClusterError as error:
        text = f"could not be had: {error}\n"
    path.write_text(text)
