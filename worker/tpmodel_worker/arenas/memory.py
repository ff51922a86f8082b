"""One planned block of a rank's memory, which outlives the rank through its descriptor."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Self

import torch

from tpmodel_worker.arenas import device as device_memory
from tpmodel_worker.arenas import host as host_memory
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId


class Arena:
    """Memory of a fixed size: sealed shared memory on CPU, a shareable allocation on CUDA.

    The memory lives as long as a descriptor of it or a mapping: the supervisor holds a copy of the
    descriptor. A mapping lives as long as any tensor made from `bytes`.
    """

    id: ArenaId
    bytes: torch.Tensor
    """The whole memory: uint8, one dimension, on the device."""
    descriptor: int
    """Open until close()."""

    def __init__(self, arena_id: ArenaId, memory: torch.Tensor, descriptor: int) -> None:
        """Takes the descriptor over. Use create or map."""
        self.id = arena_id
        self.bytes = memory
        self.descriptor = descriptor

    @classmethod
    def create(cls, arena_id: ArenaId, size: int, device: torch.device) -> Self:
        """New memory of at least size bytes, rounded up to pages or the device's granularity.

        On CPU it is zero; on CUDA it is unset.

        Raises:
            ArenaMemoryError: there is less free memory; names needed and free bytes.
            ArenaError: the device refused.
        """
        what = str(arena_id)
        if device.type == "cuda":
            descriptor, mapping = device_memory.create_device_memory(
                what, device_memory.rounded_size(size, device), device
            )
            return cls(arena_id, mapping.tensor(device), descriptor)
        _check_host(device)
        rounded = host_memory.rounded_size(size)
        descriptor = host_memory.create_host_memory(what, rounded)
        return cls._mapped(arena_id, descriptor, rounded, device)

    @classmethod
    def map(cls, arena_id: ArenaId, descriptor: int, size: int, device: torch.device) -> Self:
        """Memory that was made before, by this process or another; size: what its manifest says.

        Takes the descriptor over, also when it fails.

        Raises:
            ArenaSizeError: the memory is smaller than size, or may shrink.
            ArenaError: it can't be mapped.
        """
        return cls._mapped(arena_id, descriptor, size, device)

    @classmethod
    def _mapped(cls, arena_id: ArenaId, descriptor: int, size: int, device: torch.device) -> Self:
        try:
            if device.type == "cuda":
                mapping = device_memory.map_device_memory(str(arena_id), descriptor, size, device)
                return cls(arena_id, mapping.tensor(device), descriptor)
            _check_host(device)
            return cls(arena_id, host_memory.map_host_memory(str(arena_id), descriptor, size), descriptor)
        except (ArenaError, ValueError):
            os.close(descriptor)
            raise

    @property
    def size(self) -> int:
        """Bytes of the memory."""
        return self.bytes.numel()

    @property
    def device(self) -> torch.device:
        """Where the memory lies."""
        return self.bytes.device

    def view(self, offset: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over part of the memory, from a byte offset on.

        Raises:
            ValueError: it would reach past the end, or the offset is not a multiple of the item's size.
        """
        length = math.prod(shape) * dtype.itemsize
        if offset < 0 or offset + length > self.size:
            raise ValueError(f"{self.id}: bytes {offset} to {offset + length} wanted, it has {self.size}")
        if offset % dtype.itemsize:
            raise ValueError(f"{self.id}: offset {offset} is not a multiple of {dtype.itemsize}, as {dtype} needs")
        return self.bytes[offset : offset + length].view(dtype).view(tuple(shape))

    def close(self) -> None:
        """Closes the descriptor and lets go of the memory, which is unmapped with its last tensor. Idempotent."""
        if self.descriptor < 0:
            return
        os.close(self.descriptor)
        self.descriptor = -1
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _check_host(device: torch.device) -> None:
    if device.type != "cpu":
        raise ValueError(f"no arenas on {device}: expected cpu or cuda")
