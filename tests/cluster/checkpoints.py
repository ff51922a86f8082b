"""Model checkpoints on the nodes' disks, and the volumes through which pods read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .kubectl import Kubectl
from .node import SRV, Node

ROOT = Path(__file__).parents[2]
DEFAULT_MODEL = ROOT / "examples" / "default_model"
MODELS = f"{SRV}/models"
"""Where every node has the checkpoints: a prefix for the chart's allowedHostPaths."""


def place(node: Node, source: Path = DEFAULT_MODEL) -> str:
    """Copies a checkpoint to a node's disk, readable by every user; returns its path there."""
    target = node.disk / "srv" / "models" / source.name
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(source, unfinished)
        for path in [unfinished, *unfinished.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        unfinished.rename(target)
    return f"{MODELS}/{source.name}"


def create_claim(kubectl: Kubectl, namespace: str, *, name: str = "models", path: str = MODELS) -> str:
    """A claim that many pods on many nodes may read, bound to a folder that every node has; returns its name."""
    volume = f"{namespace}-{name}"
    kubectl.within(namespace).apply(_volume(volume, namespace, name, path), _claim(volume, name))
    kubectl.within(namespace).wait("pvc", name, "jsonpath={.status.phase}=Bound")
    return name


def delete_volumes(kubectl: Kubectl, namespace: str) -> None:
    """Volumes belong to no namespace and stay when it goes."""
    for volume in kubectl.list("pv", selector=f"{LABEL}={namespace}"):
        kubectl.delete("pv", volume["metadata"]["name"], wait=False)


LABEL = "tests/namespace"
MODES = ["ReadOnlyMany", "ReadWriteOnce"]


def _volume(volume: str, namespace: str, claim: str, path: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume, "labels": {LABEL: namespace}},
        "spec": {
            "accessModes": MODES,
            "capacity": {"storage": "1Gi"},
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": claim},
            "hostPath": {"path": path, "type": "Directory"},
        },
    }


def _claim(volume: str, name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": ["ReadOnlyMany"],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
            "volumeName": volume,
        },
    }
