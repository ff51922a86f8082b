"""Which safetensors files make up a checkpoint, and what their headers say. No torch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpmodel_worker.loading.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000

# Bytes of an element of each type that weights come in.
ITEM_SIZES: Mapping[str, int] = MappingProxyType({"F64": 8, "F32": 4, "F16": 2, "BF16": 2})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    name: str
    dtype: str
    """As the format spells it: F32, BF16, ..."""
    shape: tuple[int, ...]
    offset: int
    """First byte, counted from the beginning of the file."""
    size: int
    """Bytes."""


def list_checkpoint_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: what its index names, else its one or many files.

    Raises:
        CheckpointError: there is none, or one that the index names is missing.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is not None:
        names = sorted(set(index.values()))
        for name in names:
            if not (folder / name).is_file():
                tensor = next(tensor for tensor, file in index.items() if file == name)
                raise CheckpointError(f"{folder / name}: named by {INDEX_NAME} for tensor {tensor}, but missing")
        return [folder / name for name in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"there is no safetensors file in {folder}")
    return files


def read_index(folder: Path) -> dict[str, str] | None:
    """The index's map from tensor to file name; None where there is no index."""
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path}: tensor {tensor}: {name!r} is not a file name")
    return weight_map


def read_checkpoint(files: Sequence[str | Path]) -> dict[str, TensorEntry]:
    """The headers of all files as one map from tensor name, checked against the index beside them.

    Raises:
        CheckpointError: a file is missing, truncated or malformed, a tensor is in two files, or not in
            the one that the index names.
    """
    paths = [Path(file) for file in files]
    entries: dict[str, TensorEntry] = {}
    for path in paths:
        for entry in read_header(path):
            if entry.name in entries:
                raise CheckpointError(f"{path}: tensor {entry.name} is also in {entries[entry.name].file}")
            entries[entry.name] = entry
    for folder in sorted({path.parent for path in paths}):
        for tensor, name in (read_index(folder) or {}).items():
            if tensor not in entries or entries[tensor].file != folder / name:
                raise CheckpointError(f"{folder / name}: tensor {tensor} is missing, which {INDEX_NAME} places there")
    return entries


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of one file.

    Raises:
        CheckpointError: the file cannot be read, is shorter than its header says, or is no safetensors file.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER_BYTES, file_size - 8):
                raise CheckpointError(f"{path}: truncated or no safetensors file: {file_size} bytes, header {length}")
            header = json.loads(file.read(length))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    start = 8 + length
    entries = [
        _read_entry(path, name, fields, start, file_size) for name, fields in header.items() if name != "__metadata__"
    ]
    return sorted(entries, key=lambda entry: entry.offset)


def _read_entry(path: Path, name: str, fields: Any, start: int, file_size: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name}: malformed entry {fields!r}") from error
    if dtype not in ITEM_SIZES:
        supported = ", ".join(ITEM_SIZES)
        raise CheckpointError(f"{path}: tensor {name}: dtype {dtype!r} is not supported; supported: {supported}")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise CheckpointError(f"{path}: tensor {name}: malformed entry {fields!r}")
    size = math.prod(shape) * ITEM_SIZES[dtype]
    if end - begin != size:
        raise CheckpointError(f"{path}: tensor {name}: shape {shape} needs {size} bytes, its place has {end - begin}")
    if start + end > file_size:
        raise CheckpointError(f"{path}: truncated: tensor {name} ends at byte {start + end}, the file at {file_size}")
    return TensorEntry(path, name, dtype, tuple(shape), start + begin, size)
