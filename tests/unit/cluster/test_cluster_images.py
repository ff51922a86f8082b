"""What the images are made of, and how they are named."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import pytest

from tests.cluster import archive, binaries, cache, images

ROOT = images.ROOT
SHARED_END = "# Everything but the project's own code"


def test_both_dockerfiles_begin_alike_so_that_their_layers_are_shared() -> None:
    worker, operator = ((ROOT / image.dockerfile).read_text() for image in images.ALL)
    begin = "ARG BASE_IMAGE"
    shared = worker[worker.index(begin) : worker.index(SHARED_END)]
    assert "AS wheel" in shared
    assert shared == operator[operator.index(begin) : operator.index(SHARED_END)]


def test_builds_get_what_the_dockerignore_lets_in() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {line.removeprefix("!") for line in lines if line.startswith("!")}
    own = {".dockerignore", *(image.dockerfile for image in images.ALL)}
    assert let_in == set(images.SOURCES) - own


def test_the_images_name_no_index_of_packages() -> None:
    for image in images.ALL:
        assert not re.findall(r"https?://", (ROOT / image.dockerfile).read_text())


def test_the_version_of_kubernetes_is_the_pinned_one() -> None:
    pinned = (binaries.MODULES / "kubernetes" / "go.mod").read_text()
    assert f"k8s.io/kubernetes {binaries.KUBERNETES_VERSION}\n" in pinned


def test_a_key_follows_content_and_not_time(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = cache.files_key(tmp_path, [file])
    os.utime(file, (1, 1))
    assert cache.files_key(tmp_path, [file]) == before
    file.write_text("two")
    assert cache.files_key(tmp_path, [file]) != before


def test_a_key_tells_names_and_contents_apart(tmp_path: Path) -> None:
    assert cache.content_key(["ab", "c"]) != cache.content_key(["a", "bc"])


@pytest.mark.parametrize("chosen", ["/somewhere", ""])
def test_another_cache_has_another_name_on_the_system(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("TPMODEL_CACHE", chosen)
    assert (cache.system_name() == "tpmodel-test") == (not chosen)


def test_an_archive_leaves_out_what_its_reader_has_and_consumes_files_once_read(tmp_path: Path) -> None:
    layer = tmp_path / "layer"
    layer.write_bytes(b"content")
    manifest = json.dumps({"layers": ["sha256:there", "sha256:new"]}).encode()
    stream = io.BytesIO()
    archive.write(stream, name="an/image:1", manifest=manifest, blobs={"sha256:new": layer}, consume=True)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as read:
        names = set(read.getnames())
        index = json.loads(read.extractfile("index.json").read())  # pyright: ignore[reportOptionalMemberAccess]
    assert names == {
        "oci-layout",
        "index.json",
        "blobs/sha256/new",
        f"blobs/{archive.digest(manifest).replace(':', '/')}",
    }
    assert index["manifests"][0]["annotations"]["io.containerd.image.name"] == "an/image:1"
    assert not layer.exists()
