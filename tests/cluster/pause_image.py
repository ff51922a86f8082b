"""The image of pod sandboxes: one static program and nothing else."""

from __future__ import annotations

import io
import json
import platform
import tarfile
from pathlib import Path

from . import archive as oci
from . import binaries, cache

NAME = "localhost/tpmodel-test/pause:1"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def archive() -> Path:
    """The image as an archive in the cache, made now if it is not there."""
    program = binaries.path(binaries.PAUSE)
    made = cache.folder() / "images" / f"{program.parent.name}.tar"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        unfinished = made.with_suffix(".unfinished")
        with unfinished.open("wb") as output:
            _write(output, program)
        unfinished.rename(made)
    return made


def _write(output: io.BufferedWriter, program: Path) -> None:
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as files:
        member = files.gettarinfo(program, arcname="pause")
        member.uid = member.gid = 0
        member.mode = 0o755
        with program.open("rb") as content:
            files.addfile(member, content)
    config = json.dumps(
        {
            "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
            "os": "linux",
            "config": {"Entrypoint": ["/pause"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [oci.digest(layer.getvalue())]},
        }
    ).encode()
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": oci.MANIFEST,
            "config": oci.descriptor(oci.CONFIG, config),
            "layers": [oci.descriptor(oci.LAYER, layer.getvalue())],
        }
    ).encode()
    oci.write(
        output,
        name=NAME,
        manifest=manifest,
        blobs={oci.digest(layer.getvalue()): layer.getvalue(), oci.digest(config): config},
    )
