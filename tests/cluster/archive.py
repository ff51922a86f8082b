"""Image archives in the OCI layout, written as a stream."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
INDEX = "application/vnd.oci.image.index.v1+json"


def digest(content: bytes) -> str:
    """As manifests write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write(
    output: IO[bytes], *, name: str, manifest: bytes, blobs: Mapping[str, bytes | Path], consume: bool = False
) -> None:
    """Writes an archive of one image.

    `blobs` (digest -> content or file) may leave out layers that the reader already has. With `consume` each file
    is removed once it is written, so that a large image does not lie here and there.
    """
    with tarfile.open(fileobj=output, mode="w|") as archive:
        _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        for blob, content in {**blobs, digest(manifest): manifest}.items():
            path = f"blobs/{blob.replace(':', '/')}"
            if isinstance(content, Path):
                archive.add(content, arcname=path, recursive=False)
                if consume:
                    content.unlink()
            else:
                _add(archive, path, content)
        entry = {
            "mediaType": MANIFEST,
            "digest": digest(manifest),
            "size": len(manifest),
            "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name},
        }
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}).encode())


def descriptor(media_type: str, content: bytes) -> dict[str, object]:
    """How a manifest refers to a blob."""
    return {"mediaType": media_type, "digest": digest(content), "size": len(content)}


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
