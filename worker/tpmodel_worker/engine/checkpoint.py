"""What the engine tells the ranks about a checkpoint: its config and its files, never their content."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tpmodel_worker.engine.errors import ConfigurationError

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder as LoadDenseShard describes it."""

    config_json: str
    safetensors_paths: tuple[str, ...]
    """Absolute; empty for dummy weights."""


def read_checkpoint(folder: Path, load_format: str) -> Checkpoint:
    """Reads config.json and finds the safetensors files: those the index names, else all there are.

    Raises ConfigurationError naming the file that is missing or can't be read.
    """
    config = folder / _CONFIG
    try:
        config_json = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{config} can't be read: {error}") from error
    paths = () if load_format == "dummy" else _safetensors(folder)
    return Checkpoint(config_json, paths)


def _safetensors(folder: Path) -> tuple[str, ...]:
    index = folder / _INDEX
    if index.exists():
        try:
            names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigurationError(f"{index} can't be read: {error!r}") from error
        missing = sorted(name for name in names if not (folder / name).exists())
        if missing:
            raise ConfigurationError(f"{index} names files that are missing: {', '.join(missing)}")
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
    if not names:
        raise ConfigurationError(f"there is no safetensors file in {folder}")
    return tuple(str((folder / name).absolute()) for name in sorted(names))
