"""What the local cluster needs of a machine, looked at before anything is built."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator

from . import binaries, debian
from .errors import ClusterError


def check() -> None:
    """Raises with all that is missing, and what else one may do."""
    missing = list(_missing())
    if missing:
        raise ClusterError(
            "the end-to-end tests make a cluster of their own on this machine (tests/cluster/README.md), for which it "
            "lacks:\n" + "".join(f"  - {item}\n" for item in missing) + "Everything else: make lint unit integration"
        )


def _missing() -> Iterator[str]:
    if sys.platform != "linux":
        yield "Linux: nodes are made of its namespaces"
        return
    if os.geteuid() != 0:
        yield "root: nodes are network and mount namespaces; run it as root, or with sudo --preserve-env=HOME,PATH"
    if shutil.which("go") is None and not binaries.built():
        yield "Go 1.26 or newer on the PATH: the cluster's programs are built with it"
    packages = debian.missing(debian.NODE_NEEDS | debian.BUILD_NEEDS)
    if packages and shutil.which("apt-get") is None:
        yield f"these packages, or apt-get to install them: {', '.join(packages)}"
