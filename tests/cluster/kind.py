"""A cluster by kind, for machines where Docker runs. Its nodes cannot be broken as those of local.py can."""

from __future__ import annotations

import json
from pathlib import Path

from . import cache, checkpoints
from .images import PREFIX, ROOT
from .processes import run

NAME = "tpmodel-test"
UP_SECONDS = 600
BUILD_SECONDS = 3600


def up(nodes: int) -> Path:
    """Makes the cluster unless it is there; returns its kubeconfig."""
    kubeconfig = cache.folder() / "kind" / "kubeconfig"
    if NAME not in run(["kind", "get", "clusters"]).split():
        kubeconfig.parent.mkdir(parents=True, exist_ok=True)
        model = {"hostPath": str(checkpoints.DEFAULT_MODEL), "readOnly": True}
        mount = model | {"containerPath": f"{checkpoints.MODELS}/{checkpoints.DEFAULT_MODEL.name}"}
        roles = [{"role": "control-plane"}, *[{"role": "worker", "extraMounts": [mount]}] * nodes]
        cluster = {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "nodes": roles}
        command = ["kind", "create", "cluster", f"--name={NAME}", f"--kubeconfig={kubeconfig}", "--config=-"]
        run([*command, "--wait=5m"], input_text=json.dumps(cluster), seconds=UP_SECONDS)
    return kubeconfig


def load(dockerfile: str) -> str:
    """Builds an image with Docker, whose own cache decides what is new, and loads it; returns its name."""
    repository = f"{PREFIX}/{dockerfile.rpartition('.')[2]}"
    build = ["docker", "build", "--quiet", f"--file={ROOT / dockerfile}", str(ROOT)]
    image = run(build, seconds=BUILD_SECONDS).strip()
    # Named by content: a pod that names it never gets an older one.
    name = f"{repository}:{image.removeprefix('sha256:')[:12]}"
    run(["docker", "tag", image, name])
    run(["kind", "load", "docker-image", name, f"--name={NAME}"], seconds=BUILD_SECONDS)
    return name


def down() -> None:
    """Removes the cluster."""
    run(["kind", "delete", "cluster", f"--name={NAME}"], seconds=UP_SECONDS)
