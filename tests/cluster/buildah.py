"""Builds images without a daemon; what it stores is in the cache."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import cache, debian
from .processes import run

BUILD_SECONDS = 1800.0
PUSH_SECONDS = 600.0
LARGE_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An image written out as files."""

    manifest: bytes
    blobs: dict[str, Path]
    """Digest -> file, of the configuration and of those layers that were not left out."""
    layers: tuple[str, ...]
    """Digests of all its layers' uncompressed archives, lowest first: the same for equal layers of other images."""


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
        f"/run/{cache.system_name()}-buildah",
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


def large_layers(image: str) -> frozenset[str]:
    """Digests, as in `Exported`, of an image's layers above LARGE_BYTES."""
    sizes = _layer_sizes()
    layers = json.loads(call("inspect", "--type=image", image))["OCIv1"]["rootfs"]["diff_ids"]
    return frozenset(layer for layer in layers if sizes[layer] > LARGE_BYTES)


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
) -> None:
    """Builds a Dockerfile of the source tree; unchanged steps come from the cache of layers."""
    options = ["--isolation=chroot", "--network=host", "--layers", "--format=oci", f"--tag={name}"]
    options += [f"--file={source / dockerfile}", f"--ignorefile={source / '.dockerignore'}"]
    options += [f"--build-arg={key}={value}" for key, value in arguments.items()]
    options += [f"--secret=id={key},src={path}" for key, path in secrets.items()]
    call("bud", *options, str(source), seconds=BUILD_SECONDS)


def export(image: str, folder: Path) -> Exported:
    """Writes an image's parts into an empty folder; layers as they are, since compressing gigabytes takes minutes."""
    call("push", "--quiet", "--disable-compression", image, f"dir:{folder}", seconds=PUSH_SECONDS)
    return _exported((folder / "manifest.json").read_bytes(), folder, without=())


def export_new_layers(image: str, folder: Path, *, without: Iterable[str]) -> Exported:
    """Writes an image's parts into an empty folder, but for the layers in `without`, which the reader has."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    left_out = set(without)
    for layer, size in _layer_sizes().items():
        if layer in left_out:
            # A file of this name and size is taken for the layer, written before; it costs no space and no time.
            with _blob(blobs, layer).open("wb") as placeholder:
                placeholder.truncate(size)
    call("push", "--quiet", image, f"oci:{folder}:it", seconds=PUSH_SECONDS)
    index = json.loads((folder / "index.json").read_text())
    manifest = _blob(blobs, index["manifests"][0]["digest"]).read_bytes()
    return _exported(manifest, blobs, without=left_out)


def _exported(manifest: bytes, blobs: Path, *, without: Iterable[str]) -> Exported:
    parts = json.loads(manifest)
    configuration = parts["config"]["digest"]
    layers = tuple(json.loads(_blob(blobs, configuration).read_text())["rootfs"]["diff_ids"])
    new = [part["digest"] for layer, part in zip(layers, parts["layers"], strict=True) if layer not in without]
    return Exported(
        manifest=manifest, blobs={digest: _blob(blobs, digest) for digest in (configuration, *new)}, layers=layers
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
