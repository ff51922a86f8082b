"""What is sent in which order, and how tensors share a broadcast. Both sides compute the same from the same words."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from tpmodel.v1 import weights_pb2

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
)
"""Types that weights are sent in; the receiver converts."""
ALIGNMENT = 16
"""Bytes to which every tensor of a chunk is aligned."""
MAX_BUFFERS = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A full tensor as it is sent, by its name in the checkpoint."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tensors that one broadcast carries, with their offsets in it."""

    places: tuple[tuple[TensorInfo, int], ...]
    bytes: int


def describe(name: str, tensor: torch.Tensor) -> TensorInfo:
    """What is said about a tensor before it is sent. Raises ValueError for a dtype that weights can't have."""
    given: Any = tensor
    if not isinstance(given, torch.Tensor):
        raise ValueError(f"{name} is a {type(given).__name__}: weights are tensors of torch")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}: weights are sent as one of {', '.join(DTYPES)}")
    return TensorInfo(name, dtype, tuple(tensor.shape))


def read_update(request: weights_pb2.UpdateRequest) -> list[TensorInfo]:
    """The request's tensors, in order.

    Raises:
        ValueError: its lists differ in length, a dtype is unknown, a name comes twice, or the buffers can't be.
    """
    names, dtypes, shapes = request.names, request.dtypes, request.shapes
    if not len(names) == len(dtypes) == len(shapes):
        raise ValueError(f"{len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes: as many of each")
    if request.packed and request.buffer_size < 1:
        raise ValueError(f"buffer_size is {request.buffer_size}: at least 1 byte where tensors are packed")
    if request.packed and not 1 <= request.buffer_count <= MAX_BUFFERS:
        raise ValueError(f"buffer_count is {request.buffer_count}: 1 to {MAX_BUFFERS}")
    seen: set[str] = set()
    tensors: list[TensorInfo] = []
    for name, dtype, shape in zip(names, dtypes, shapes, strict=True):
        if dtype not in DTYPES:
            raise ValueError(f"{name}: unknown dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
        if name in seen:
            raise ValueError(f"{name} is named twice")
        seen.add(name)
        tensors.append(TensorInfo(name, dtype, tuple(shape.dimensions)))
    return tensors


def write_update(
    tensors: Sequence[TensorInfo], *, packed: bool, buffer_size: int, buffer_count: int
) -> weights_pb2.UpdateRequest:
    """The request that read_update reads."""
    return weights_pb2.UpdateRequest(
        names=[tensor.name for tensor in tensors],
        dtypes=[tensor.dtype for tensor in tensors],
        shapes=[weights_pb2.Shape(dimensions=tensor.shape) for tensor in tensors],
        packed=packed,
        buffer_size=buffer_size,
        buffer_count=buffer_count,
    )


def plan_chunks(tensors: Iterable[TensorInfo], buffer_size: int) -> list[Chunk]:
    """Fills chunks in order: one closes with the tensor that takes it over buffer_size bytes, or with the last one."""
    chunks: list[Chunk] = []
    places: list[tuple[TensorInfo, int]] = []
    end = 0
    for tensor in tensors:
        offset = -(-end // ALIGNMENT) * ALIGNMENT
        places.append((tensor, offset))
        end = offset + tensor.bytes
        if end > buffer_size:
            chunks.append(Chunk(tuple(places), end))
            places, end = [], 0
    if places:
        chunks.append(Chunk(tuple(places), end))
    return chunks


def view_in(buffer: torch.Tensor, tensor: TensorInfo, offset: int) -> torch.Tensor:
    """The tensor's place in a (bytes,) uint8 buffer, as a view of it."""
    return buffer[offset : offset + tensor.bytes].view(DTYPES[tensor.dtype]).view(tensor.shape)
