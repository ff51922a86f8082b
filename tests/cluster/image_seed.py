"""The disk that every node starts from: a containerd that has the images' large layers.

Made once, then copied by hard links: a node costs no space and two seconds. Layers of images are never written to,
only containerd's databases are, and those are copied for real.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import archive, buildah, cache
from .errors import ClusterError
from .processes import Daemon, run
from .waiting import wait_until

LAYERS = "layers.json"
"""Beside containerd's folder: the digests of the layers that it has."""
BLOBS = "containerd/io.containerd.content.v1.content/blobs/sha256"
START_SECONDS = 30.0
CONNECT = "--connect-timeout=120s"
"""Writing gigabytes stalls a small machine's disk for longer than the default."""
IMPORT_SECONDS = 900.0


def copy_to(disk: Path, names: Sequence[str]) -> None:
    """Makes a node's disk from the seed of these images; the folder appears when it is complete."""
    seed = make(names)
    unfinished = disk.with_name(f"{disk.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    disk.parent.mkdir(parents=True, exist_ok=True)
    run(["cp", "--archive", "--link", str(seed), str(unfinished)])
    for path in [*unfinished.rglob("*.db"), unfinished / LAYERS]:
        shared = path.with_name(f"{path.name}.shared")
        path.rename(shared)
        shutil.copy2(shared, path)
        shared.unlink()
    unfinished.rename(disk)


def is_current(disk: Path, names: Sequence[str]) -> bool:
    """Whether a node's disk has all large layers of these images."""
    record = disk / LAYERS
    have: list[str] = json.loads(record.read_text()) if record.exists() else []
    return _large_layers(names) <= set(have)


def make(names: Sequence[str]) -> Path:
    """The seed for images with these large layers, made now if it is not there (minutes)."""
    seed = cache.folder() / "seeds" / cache.content_key(sorted(_large_layers(names)))
    with cache.locked("seed"):
        if not seed.exists():
            print("making the disk that nodes start from", flush=True)
            # Older ones first: two of them at a time would be many gigabytes.
            shutil.rmtree(seed.parent, ignore_errors=True)
            seed.parent.mkdir(parents=True)
            unfinished = seed.with_name(f"{seed.name}.unfinished")
            try:
                _fill(unfinished, names)
                unfinished.rename(seed)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    return seed


def _large_layers(names: Sequence[str]) -> set[str]:
    return {layer for name in names for layer in buildah.large_layers(name)}


def _fill(folder: Path, wanted: Sequence[str]) -> None:
    have: list[str] = []
    with _containerd(folder / "containerd") as address:
        for image in wanted:
            have += [layer for layer in _import(address, image) if layer not in have]
        for layer in have:
            _ctr(address, "content", "rm", layer)
    for layer in have:
        # Unpacked, a layer's archive is of no more use: half of the seed's size. containerd removes it some time later.
        (folder / BLOBS / layer.removeprefix("sha256:")).unlink(missing_ok=True)
    (folder / LAYERS).write_text(json.dumps(have))


def _import(address: Path, image: str) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        exported = buildah.export(image, Path(folder) / "image")
        command = ["ctr", CONNECT, f"--address={address}", "--namespace=k8s.io", "images", "import", "-"]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ) as importer:
            stream = importer.stdin
            assert stream is not None
            # Files go as soon as they are read: not both there and here.
            with contextlib.suppress(BrokenPipeError):
                archive.write(stream, name=image, manifest=exported.manifest, blobs=exported.blobs, consume=True)
                stream.close()
            output = importer.stdout.read().decode() if importer.stdout else ""
        if importer.returncode != 0:
            raise ClusterError(f"loading {image} failed:\n{output}")
    return exported.layers


def _scratch() -> Path:
    scratch = cache.folder() / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    return scratch


@contextlib.contextmanager
def _containerd(root: Path) -> Iterator[Path]:
    """A containerd on this folder for as long as the block runs."""
    root.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=_scratch()) as folder:
        socket = Path(folder) / "containerd.sock"
        configuration = Path(folder) / "containerd.toml"
        configuration.write_text(
            f'version = 2\nroot = "{root}"\nstate = "{folder}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{socket}"\n'
            f'[plugins."io.containerd.internal.v1.opt"]\npath = "{folder}/opt"\n'
        )
        daemon = Daemon(name="containerd", folder=Path(folder))
        daemon.start(["containerd", "--config", str(configuration)], dies_with_parent=True)
        try:
            wait_until(socket.exists, what="containerd for the seed", seconds=START_SECONDS, explain=daemon.last_lines)
            try:
                yield socket
            except ClusterError as error:
                raise ClusterError(f"{error}\n{daemon.last_lines()}") from error
        finally:
            daemon.stop()


def _ctr(address: Path, *arguments: str) -> None:
    run(["ctr", CONNECT, f"--address={address}", "--namespace=k8s.io", *arguments], seconds=IMPORT_SECONDS)
