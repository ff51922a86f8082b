"""Where everything that outlives a cluster is kept: programs and images, by version or content."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path


def folder() -> Path:
    """`$TPMODEL_CACHE`, else ~/.cache/tpmodel."""
    return chosen() or Path.home() / ".cache" / "tpmodel"


def chosen() -> Path | None:
    """`$TPMODEL_CACHE`, if it is set."""
    value = os.environ.get("TPMODEL_CACHE")
    return Path(value).absolute() if value else None


def system_name() -> str:
    """For what lies outside the cache. With another cache it is another: two clusters do not meet."""
    path = chosen()
    return f"tpmodel-test-{content_key([str(path)])}" if path else "tpmodel-test"


@contextlib.contextmanager
def locked(name: str, *, shared: bool = False) -> Iterator[None]:
    """One process at a time makes what `name` stands for; the others wait and then find it made.

    Any number of processes have it at a time if all of them say `shared`.
    """
    path = folder() / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield


def content_key(parts: Iterable[str | bytes]) -> str:
    """A short name for content: equal for equal parts in equal order."""
    digest = hashlib.sha256()
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:12]


def files_key(root: Path, files: Iterable[Path], *more: str) -> str:
    """`content_key` of files' names (relative to `root`), modes' executable bit and contents."""
    parts: list[str | bytes] = list(more)
    for file in sorted(files):
        executable = "x" if os.access(file, os.X_OK) else "-"
        parts += [f"{file.relative_to(root)} {executable}", file.read_bytes()]
    return content_key(parts)
