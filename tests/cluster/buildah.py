"""Builds images without a daemon; what it stores is in the cache."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import archive, cache, debian
from .errors import ClusterError
from .processes import run

BUILD_SECONDS = 1800.0
PUSH_SECONDS = 600.0
RUNTIME = "/run/tpmodel-test-buildah"


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An image written out as files."""

    manifest: bytes
    blobs: dict[str, Path]
    """Digest -> file, of the configuration and of those layers that were not left out."""
    layers: tuple[str, ...]
    """Digests of all its layers, lowest first; of uncompressed archives, so they are the same in every image."""


def command(*arguments: str) -> list[str]:
    """A buildah command line on the cache's storage."""
    debian.ensure(debian.BUILD_NEEDS)
    # In a mount namespace of its own, so that none of its mounts stays behind.
    private = ["unshare", "--mount", "--propagation=private", "--"]
    return [
        *private,
        "buildah",
        "--root",
        str(_storage()),
        "--runroot",
        RUNTIME,
        "--storage-driver",
        "overlay",
        *arguments,
    ]


def call(*arguments: str, seconds: float = 300) -> str:
    """Runs one and returns its output."""
    return run(command(*arguments), seconds=seconds).strip()


def exists(image: str) -> bool:
    """Whether the storage has an image of this name."""
    return subprocess.run(command("inspect", "--type=image", image), capture_output=True).returncode == 0


def names(repository: str) -> list[str]:
    """Images of a repository, newest first."""
    found = json.loads(call("images", "--json") or "null") or []
    newest = sorted(found, key=lambda image: image["createdatraw"], reverse=True)
    return [name for image in newest for name in image["names"] or [] if name.rpartition(":")[0] == repository]


def build(
    source: Path,
    dockerfile: str,
    *,
    name: str,
    arguments: Mapping[str, str],
    secrets: Mapping[str, Path],
    target: str = "",
) -> None:
    """Builds a Dockerfile of the source tree; unchanged steps come from the cache of layers."""
    options = ["--isolation=chroot", "--network=host", "--layers", "--format=oci", f"--tag={name}"]
    options += [f"--file={source / dockerfile}", f"--ignorefile={source / '.dockerignore'}"]
    options += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    options += [f"--secret=id={key},src={path}" for key, path in secrets.items()]
    if target:
        options.append(f"--target={target}")
    call("bud", *options, str(source), seconds=BUILD_SECONDS)


def export(image: str, folder: Path, *, without: Iterable[str] = ()) -> Exported:
    """Writes an image's parts into the folder, but for the layers in `without`, which the reader has."""
    left_out = set(without)
    folder.mkdir(parents=True, exist_ok=True)
    for layer, size in _layer_sizes().items():
        if layer in left_out:
            # A file of this name and size is taken for the layer, written before; it costs no space and no time.
            with _blob(folder, layer).open("wb") as placeholder:
                placeholder.truncate(size)
    # The one kind of folder into which buildah writes layers as they are; compressing gigabytes takes minutes.
    call("push", "--quiet", "--disable-compression", "--format=oci", image, f"dir:{folder}", seconds=PUSH_SECONDS)
    manifest = (folder / "manifest.json").read_bytes()
    parts = json.loads(manifest)
    if any(layer["mediaType"] != archive.LAYER for layer in parts["layers"]):
        raise ClusterError(f"buildah has compressed a layer of {image}")
    layers = tuple(layer["digest"] for layer in parts["layers"])
    written = [parts["config"]["digest"], *(layer for layer in layers if layer not in left_out)]
    return Exported(
        manifest=manifest,
        blobs={digest: _blob(folder, digest) for digest in written},
        layers=layers,
    )


def _storage() -> Path:
    return cache.folder() / "buildah"


def _blob(folder: Path, digest: str) -> Path:
    return folder / digest.removeprefix("sha256:")


def _layer_sizes() -> dict[str, int]:
    record = _storage() / "overlay-layers" / "layers.json"
    return {
        layer["diff-digest"]: layer["diff-size"] for layer in json.loads(record.read_text()) if "diff-digest" in layer
    }
