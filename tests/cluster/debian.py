"""What nodes and image builds need from the system: Debian's packages, installed when missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from . import cache
from .errors import ClusterError

CNI_PLUGINS = Path("/usr/lib/cni")
INSTALL_SECONDS = 600

NODE_NEEDS = {
    "containerd": "containerd",
    "runc": "runc",
    "iptables": "iptables",
    "conntrack": "conntrack",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "openssl": "openssl",
    str(CNI_PLUGINS / "bridge"): "containernetworking-plugins",
}
"""Command or file -> the package that has it."""

BUILD_NEEDS = {"buildah": "buildah", "debootstrap": "debootstrap"}


def ensure(needs: dict[str, str]) -> None:
    """Installs the packages of the commands that are missing."""
    if not missing(needs):
        return
    with cache.locked("packages"):
        packages = missing(needs)
        if packages:
            _install(packages)
    still = missing(needs)
    if still:
        raise ClusterError(f"installed {', '.join(still)}, and what it should bring is still missing")


def missing(needs: dict[str, str]) -> list[str]:
    """The packages of the commands that are not there."""
    # Daemons' folders are not on every user's PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return sorted({package for name, package in needs.items() if shutil.which(name, path=path) is None})


def _install(packages: list[str]) -> None:
    if shutil.which("apt-get") is None:
        raise ClusterError(f"install these first: {', '.join(packages)}")
    print(f"installing {', '.join(packages)}", flush=True)
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS, stdin=subprocess.DEVNULL
        )
        if result.returncode != 0:
            raise ClusterError(f"{' '.join(command)}:\n{(result.stdout + result.stderr)[-3000:]}")
