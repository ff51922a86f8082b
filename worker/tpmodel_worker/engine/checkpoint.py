"""What the engine tells the ranks about a checkpoint: its config and its files, never their content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tpmodel_worker.engine.errors import ConfigurationError
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files
from tpmodel_worker.loading.errors import CheckpointError

_CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint folder as LoadDenseShard describes it."""

    config_json: str
    safetensors_paths: tuple[str, ...]
    """Absolute; empty for dummy weights."""


def read_checkpoint(folder: Path, load_format: str) -> Checkpoint:
    """Reads config.json and finds the safetensors files.

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
    try:
        files = list_checkpoint_files(folder)
    except CheckpointError as error:
        raise ConfigurationError(str(error)) from error
    return tuple(str(path.absolute()) for path in files)
