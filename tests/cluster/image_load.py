"""Brings images to the nodes of a running cluster: only the layers that a node does not have yet."""

from __future__ import annotations

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import archive, buildah, cache, image_seed
from .errors import ClusterError
from .node import Node

LARGEST_BYTES = 1 << 30


def load(nodes: list[Node], image: str) -> None:
    """Loads a built image into every node that does not have it."""
    lacking = [node for node in nodes if image not in node.ctr("images", "list", "--quiet").split()]
    if not lacking:
        return
    # Nodes start from the same disk and are given the same images, so they have the same layers.
    common = set.intersection(*(set(_layers(node)) for node in lacking))
    scratch = cache.folder() / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        exported = buildah.export_new_layers(image, Path(folder) / "layout", without=common)
        size = sum(path.stat().st_size for path in exported.blobs.values())
        if size > LARGEST_BYTES:
            raise ClusterError(
                f"{image} has {size >> 20} MiB of layers that the nodes started without: its dependencies have "
                "changed; take the cluster down and up again"
            )
        packed = Path(folder) / "image.tar"
        with packed.open("wb") as output:
            archive.write(output, name=image, manifest=exported.manifest, blobs=exported.blobs, consume=True)
        with ThreadPoolExecutor(len(lacking)) as pool:
            list(pool.map(lambda node: _import(node, packed, exported.layers), lacking))


def _layers(node: Node) -> list[str]:
    record = node.disk / image_seed.LAYERS
    return json.loads(record.read_text()) if record.exists() else []


def _import(node: Node, packed: Path, layers: tuple[str, ...]) -> None:
    node.ctr("images", "import", str(packed))
    (node.disk / image_seed.LAYERS).write_text(json.dumps(sorted({*_layers(node), *layers})))
