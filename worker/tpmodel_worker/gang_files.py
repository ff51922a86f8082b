"""What the operator leaves word of in a gang's ConfigMap, beside the attempt, while the pods run.

Kubernetes puts a new version in the place of the old one within about a minute and a half, by turning a symbolic link:
files are opened by path at each look. One that is missing or cannot be read says nothing.
"""

from __future__ import annotations

import re
from pathlib import Path

REBUILD = "rebuild"
"""How often a user has asked for a new world since the gang was made: a whole number that only rises."""
MODEL_REVISION = "model-revision"
"""The commit that the rollout's hf:// model was resolved to, once that is known."""
WEIGHTS_VERSION = "weights-version"
"""Version of the weights that the gang committed last, of all its pods before these: a whole number, 0 is the
checkpoint."""

_COMMIT = re.compile(r"[0-9a-f]{40}")


def read_rebuild(folder: str) -> int | None:
    """The counter of requests; None where nothing is said. folder: ServeSettings.gang_dir, "" has no files."""
    return read_whole_number(Path(folder) / REBUILD) if folder else None


def read_model_revision(folder: str) -> str:
    """The commit; "" where nothing is said."""
    text = _read(folder, MODEL_REVISION)
    return text if _COMMIT.fullmatch(text) else ""


def read_weights_version(folder: str) -> int:
    """The version; 0 where nothing is said."""
    return (read_whole_number(Path(folder) / WEIGHTS_VERSION) or 0) if folder else 0


def read_whole_number(file: Path) -> int | None:
    """What the file holds; None where it is missing, cannot be read or holds anything else."""
    text = _read(str(file.parent), file.name)
    return int(text) if text.isascii() and text.isdecimal() else None


def _read(folder: str, name: str) -> str:
    if not folder:
        return ""
    try:
        return (Path(folder) / name).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
