"""Whether the folder for a trainer's weights can be used: found out before anything is served, not after an update."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from tpmodel_worker.models.config import read_model_config
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.configuration import SERVE_FLAGS, ConfigurationError, Flags

_ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float32": 4, "float16": 2, "bfloat16": 2})


def free_bytes(folder: Path) -> int:
    """Of the file system that the folder is on."""
    return shutil.disk_usage(folder).free


def check_persist_folder(
    settings: ServeSettings, flags: Flags = SERVE_FLAGS, *, free: Callable[[Path], int] = free_bytes
) -> None:
    """Makes the folder where there is none, and writes a byte into it.

    Pods do not ask: in a gang that is started anew, a volume that is full must not keep the model from being served.

    Args:
        settings: with the checkpoint's folder, by the size of whose files a set of weights is judged.
        flags: those of pods have no name for the setting.
        free: bytes that are free on a folder's file system.

    Raises:
        ConfigurationError: it cannot be written, or there is no room for one set.
    """
    flag = flags.get("persist_updates", "")
    if not flag or not settings.persist_updates:
        return
    folder = Path(settings.persist_updates)
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{flag} {folder}: this is a file, a folder is needed")
    if not folder.exists() and not folder.parent.is_dir():
        raise ConfigurationError(f"{flag} {folder}: {folder.parent} does not exist: make it, or name another folder")
    try:
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
    except OSError as error:
        raise ConfigurationError(f"{flag} {folder}: it cannot be written: {error.strerror or error}") from error
    needed, there = _set_bytes(settings), free(folder)
    if there < needed:
        raise ConfigurationError(
            f"{flag} {folder}: one set of weights needs {needed} bytes, {there} are free there: make room, or name "
            "another folder"
        )


def _set_bytes(settings: ServeSettings) -> int:
    """Of all ranks together, in the dtype that is served. Weights that are drawn have no files to go by."""
    if settings.load_format == "dummy":
        return 0
    model = read_model_config(settings.model_path, world_size=settings.world_size)
    stored = sum(file.stat().st_size for file in Path(settings.model_path).glob("*.safetensors"))
    served = _ITEM_BYTES.get(settings.dtype or model.dtype, 0)
    return stored * served // _ITEM_BYTES.get(model.dtype, served or 1)
