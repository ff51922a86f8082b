"""The functions of shared_memory.c. Loaded with CDLL, whose calls release the interpreter's lock."""

from __future__ import annotations

import ctypes
import functools
from enum import IntEnum
from pathlib import Path

import torch

_PATH = Path(__file__).with_name("_shared_memory.so")

DATA_TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3, torch.int64: 4}
"""Numbers of the dtypes that can be summed; as enum data_type."""


class Result(IntEnum):
    """How a call ended; as enum result."""

    OK = 0
    ABORTED = 1
    DEADLINE = 2
    EPOCH = 3
    MISMATCH = 4
    CORRUPT = 5


@functools.cache
def load_library() -> ctypes.CDLL:
    """The compiled library with its signatures set; OSError when it was not built."""
    library = ctypes.CDLL(str(_PATH))
    pointer, word, half = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
    signatures: dict[str, tuple[type | None, list[type]]] = {
        "tpmodel_arena_bytes": (word, [word]),
        "tpmodel_arena_reset": (None, [pointer, word, word]),
        "tpmodel_arena_check": (ctypes.c_int, [pointer, word, word]),
        "tpmodel_world_create": (pointer, [half, half, ctypes.POINTER(pointer), word, word, word, half]),
        "tpmodel_world_destroy": (None, [pointer]),
        "tpmodel_world_abort": (None, [pointer]),
        "tpmodel_world_failed_peer": (half, [pointer]),
        "tpmodel_world_sequence": (word, [pointer]),
        "tpmodel_all_reduce": (ctypes.c_int, [pointer, pointer, word, half]),
        "tpmodel_all_gather": (ctypes.c_int, [pointer, pointer, pointer, word]),
        "tpmodel_broadcast": (ctypes.c_int, [pointer, pointer, word, half]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library
