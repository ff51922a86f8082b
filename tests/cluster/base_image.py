"""The image that the project's images are built on.

By default a Debian made by debootstrap, since no registry is reached here; it stands for the Dockerfiles' default,
which has the same distribution and the same Python. $TPMODEL_TEST_BASE_IMAGE names another.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from . import buildah, cache
from .processes import run

RELEASE = "bookworm"
# python3-dev: like the official image, this one has Python's headers, which Triton compiles against.
PACKAGES = ("ca-certificates", "python3", "python3-dev", "python3-venv")
UNNEEDED = ("var/cache/apt", "var/lib/apt/lists", "var/log", "usr/share/doc", "usr/share/man", "usr/share/locale")
BOOTSTRAP_SECONDS = 900


def name() -> str:
    """The base image's name, made now if it is not there."""
    chosen = os.environ.get("TPMODEL_TEST_BASE_IMAGE")
    if chosen:
        return chosen
    made = f"localhost/tpmodel-test/base:{cache.content_key([RELEASE, *PACKAGES])}"
    with cache.locked("base-image"):
        if not buildah.exists(made):
            print("making the base image", flush=True)
            _bootstrap(made)
    return made


def _bootstrap(made: str) -> None:
    scratch = cache.folder() / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        root = Path(folder) / "root"
        # Its own default mirror: the image names no other.
        options = ["--variant=minbase", f"--include={','.join(PACKAGES)}", RELEASE, str(root)]
        run(["debootstrap", *options], seconds=BOOTSTRAP_SECONDS)
        for unneeded in UNNEEDED:
            for path in (root / unneeded).glob("*"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for host_file in ("etc/resolv.conf", "etc/hostname"):
            (root / host_file).write_text("")
        container = buildah.call("from", "scratch")
        try:
            buildah.call("add", "--quiet", container, str(root), "/")
            buildah.call("config", "--env=LANG=C.UTF-8", "--cmd=python3", container)
            buildah.call("commit", "--quiet", "--format=oci", container, made)
        finally:
            buildah.call("rm", container)
