"""Which cluster the tests use: this machine's own, a given one, or kind's where Docker runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import binaries, cache, checkpoints, debian, image_load, image_seed, images, kind, requirements
from .errors import ClusterError
from .kubectl import Kubectl
from .local import NODES, LocalCluster
from .node import Node

CHOICE = "TPMODEL_TEST_CLUSTER"
"""local (the default), existing or kind."""
KEEP = "TPMODEL_KEEP_CLUSTER"
IN_USE = "e2e"
"""Runs of tests/e2e hold this lock."""
WORKER_IMAGE, OPERATOR_IMAGE = "TPMODEL_TEST_WORKER_IMAGE", "TPMODEL_TEST_OPERATOR_IMAGE"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A cluster that is up and has the project's images."""

    kubectl: Kubectl
    worker_image: str
    operator_image: str
    local: LocalCluster | None = None
    """The nodes and components, where they are ours to break."""


def choice() -> str:
    """What $TPMODEL_TEST_CLUSTER says."""
    chosen = os.environ.get(CHOICE, "local")
    if chosen not in ("local", "existing", "kind"):
        raise ClusterError(f"{CHOICE} is {chosen!r}: set it to local, existing or kind")
    return chosen


def up(*, nodes: int = NODES, replace: bool = False) -> Target:
    """Brings the chosen cluster up with the images of the code as it is now.

    Nodes that began with older large layers cannot take these images; `replace` says that new ones may take their
    place, once no test uses them.
    """
    chosen = choice()
    if chosen == "existing":
        return _existing()
    if chosen == "kind":
        return _kind(nodes)
    return _local(nodes, replace=replace)


def check() -> None:
    """Raises with all that is missing on this machine for the chosen cluster."""
    chosen = choice()
    if chosen == "existing":
        _check_existing()
    elif chosen == "kind":
        _check_kind()
    else:
        requirements.check()


def build() -> None:
    """Builds all that the local cluster and its tests are made of, and starts nothing that stays."""
    requirements.check()
    # Packages come over the network and fill the disk, programs keep the processors busy: side by side.
    with ThreadPoolExecutor(1) as beside:
        disk = beside.submit(lambda: image_seed.make([image.build() for image in images.ALL]))
        debian.ensure(debian.NODE_NEEDS)
        binaries.ensure()
        disk.result()


def _local(nodes: int, *, replace: bool) -> Target:
    requirements.check()
    names = [image.build() for image in (images.WORKER, images.OPERATOR)]
    cluster = LocalCluster(count=nodes, prepare_disk=lambda node: _prepare_disk(node, names))
    if any(node.disk.exists() and not image_seed.is_current(node.disk, names) for node in cluster.nodes):
        if not replace:
            raise ClusterError("the cluster's nodes have older dependencies than the images: run make cluster-up")
        print("new nodes take the place of those with older dependencies, when no test uses them", flush=True)
        image_seed.make(names)
        with cache.locked(IN_USE):
            cluster.down()
            cluster.up()
    else:
        cluster.up()
    for name in names:
        image_load.load(cluster.nodes, name)
    return Target(kubectl=cluster.kubectl, worker_image=names[0], operator_image=names[1], local=cluster)


@contextlib.contextmanager
def running() -> Iterator[Target]:
    """`up` for the block; removed at its end, also after a failed start, unless $TPMODEL_KEEP_CLUSTER is 1."""
    with contextlib.ExitStack() as at_end:
        if os.environ.get(KEEP) != "1":
            at_end.callback(_down)
        yield up()


def _down() -> None:
    if choice() == "local":
        LocalCluster().down()
    elif choice() == "kind":
        kind.down()


def _prepare_disk(node: Node, names: list[str]) -> None:
    image_seed.copy_to(node.disk, names)
    checkpoints.place(node)


def _check_existing() -> None:
    missing = [name for name in ("KUBECONFIG", WORKER_IMAGE, OPERATOR_IMAGE) if not os.environ.get(name)]
    if missing:
        raise ClusterError(
            f"{CHOICE}=existing needs {', '.join(missing)} too; its nodes must be able to pull the images"
        )


def _existing() -> Target:
    _check_existing()
    return Target(
        kubectl=Kubectl(Path(os.environ["KUBECONFIG"])),
        worker_image=os.environ[WORKER_IMAGE],
        operator_image=os.environ[OPERATOR_IMAGE],
    )


def _check_kind() -> None:
    if shutil.which("kind") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        raise ClusterError(f"{CHOICE}=kind needs kind and a running Docker")


def _kind(nodes: int) -> Target:
    _check_kind()
    kubeconfig = kind.up(nodes)
    worker, operator = (kind.load(image.dockerfile) for image in (images.WORKER, images.OPERATOR))
    return Target(kubectl=Kubectl(kubeconfig), worker_image=worker, operator_image=operator)
