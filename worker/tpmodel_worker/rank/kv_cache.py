"""The caches of one rank, paged KV and the state of linear-attention layers: how large they may be, and their arena."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.host import free_host_bytes
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.keeper import ArenaKeeper
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.kv.transfer import RequestCache
from tpmodel_worker.models.batch import LayerCache, LayerKvCache, LayerState, StateShape
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.upload import upload

_HOST_FRACTION = 0.25
_HOST_MOST_BYTES = 4 << 30
_DEVICE_FRACTION = 0.9
_SCRATCH_BLOCKS = 1
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class StateMemory:
    """What the linear-attention layers keep of all slots on one rank."""

    shape: StateShape
    layers: int
    slots: int
    dtype: torch.dtype
    """Of the convolution's features; the recurrent state is float32."""

    @property
    def convolution_bytes(self) -> int:
        """Bytes of the features that convolutions look back at."""
        return _aligned(self.layers * self.slots * math.prod(self.shape.convolution) * self.dtype.itemsize)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the recurrent state."""
        return _aligned(self.layers * self.slots * math.prod(self.shape.recurrent) * torch.float32.itemsize)

    @property
    def bytes(self) -> int:
        """Bytes of both."""
        return self.convolution_bytes + self.recurrent_bytes


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's K and V take on one rank, and what all slots' states take beside them."""

    layers: int
    """Those that keep K and V."""
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    states: StateMemory | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all slots; 0 where no layer keeps one."""
        return self.states.bytes if self.states is not None else 0

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of the keys of one block in one layer; the values take as many."""
        return self.block_size * self.kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers, keys and values."""
        return 2 * self.layers * self.layer_block_bytes


@dataclass(frozen=True, slots=True)
class KvDemand:
    """What bounds the number of blocks besides memory."""

    kv_cache_bytes: int
    """0: by what is free."""
    max_num_seqs: int
    max_model_len: int
    activation_bytes: int
    """Of the device's free memory, left for activations."""
    weights_bytes: int
    ranks_on_host: int
    ranks_on_device: int = 1
    """Those that share a CUDA device."""


def available_blocks(shape: KvShape, demand: KvDemand, device: torch.device) -> int:
    """Blocks that the cache can have beside its scratch block and the slots' states.

    Without kv_cache_bytes never more than max_num_seqs sequences of max_model_len tokens need.

    Raises:
        RequestError: the memory does not hold one sequence of one block (out of memory), or kv_cache_bytes can never
            work here (invalid argument); names the numbers.
    """
    least = (1 + _SCRATCH_BLOCKS) * shape.block_bytes + shape.state_bytes
    states = _states_in_words(shape)
    if demand.kv_cache_bytes:
        _check_kv_cache_bytes(demand, device, least, states)
        return (demand.kv_cache_bytes - shape.state_bytes) // shape.block_bytes - _SCRATCH_BLOCKS
    free = _free_bytes(demand, device)
    if free < least:
        raise RequestError(
            pb.ERROR_KIND_OUT_OF_MEMORY,
            f"a KV cache needs at least {least} bytes on each rank{states}, {free} are free",
        )
    blocks = (free - shape.state_bytes) // shape.block_bytes - _SCRATCH_BLOCKS
    return min(blocks, demand.max_num_seqs * -(-demand.max_model_len // shape.block_size))


def _states_in_words(shape: KvShape) -> str:
    if shape.states is None:
        return ""
    return f" ({shape.state_bytes} of them for the recurrent state of max_num_seqs = {shape.states.slots} sequences)"


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _check_kv_cache_bytes(demand: KvDemand, device: torch.device, least: int, states: str) -> None:
    """Refuses a size that no retry makes work; one that is only too large just now is found when it is allocated."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        most = total // demand.ranks_on_device
    else:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = total // demand.ranks_on_host
    if not least <= demand.kv_cache_bytes <= most:
        raise RequestError(
            pb.ERROR_KIND_INVALID_ARGUMENT,
            f"KV cache memory: {demand.kv_cache_bytes} bytes on each rank can't work, at least {least} are needed"
            f"{states} and at most {most} can be there",
        )


def _free_bytes(demand: KvDemand, device: torch.device) -> int:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if demand.ranks_on_device > 1:
            # The others may not have loaded yet: each has its share of the device, and its weights in that.
            free = min(free, total // demand.ranks_on_device - demand.weights_bytes)
        return max(0, int(_DEVICE_FRACTION * (free + cached)) - demand.activation_bytes)
    return int(min(_HOST_FRACTION * free_host_bytes(), _HOST_MOST_BYTES)) // demand.ranks_on_host


def release_kv_arena(rank: int, arenas: ArenaKeeper) -> None:
    """Makes the supervisor let go of a rank's KV cache, if it holds one."""
    arenas.release(ArenaId(rank, "kv"))


class KvCache:
    """The kv arena and its views, by layer."""

    def __init__(
        self,
        shape: KvShape,
        num_blocks: int,
        *,
        keeps_state: Sequence[bool],
        rank: int,
        device: torch.device,
        arenas: ArenaKeeper,
    ) -> None:
        """Makes the arena and hands it to the supervisor.

        Args:
            shape: of everything in it.
            num_blocks: of KV, without the scratch block.
            keeps_state: for each layer, whether it keeps a state instead of K and V.
            rank: of this process.
            device: where the arena lies.
            arenas: the supervisor's side.

        Raises:
            ArenaMemoryError: it does not fit.
            ArenaError: the device or the supervisor refused.
        """
        self.shape = shape
        self.num_blocks = num_blocks
        self._arenas = arenas
        total = num_blocks + _SCRATCH_BLOCKS
        kv_bytes = total * shape.block_bytes
        if shape.states is not None:
            kv_bytes = _aligned(kv_bytes)
        self._arena = Arena.create(ArenaId(rank, "kv"), kv_bytes + shape.state_bytes, device)
        if device.type == "cuda":
            # Masked attention multiplies what it must not see by 0: so it must be finite.
            self._arena.bytes.zero_()
        arenas.store(self._arena, pb.ArenaManifest())
        dimensions = (total, shape.block_size, shape.kv_heads, shape.head_dim)
        stride = total * shape.layer_block_bytes
        parts = [self._arena.view(part * stride, dimensions, shape.dtype) for part in range(2 * shape.layers)]
        self._kv = tuple(
            LayerKvCache(keys=keys, values=values) for keys, values in zip(parts[::2], parts[1::2], strict=True)
        )
        self._states = self._state_views(shape.states, kv_bytes) if shape.states is not None else ()
        states = [LayerState(*of_layer) for of_layer in zip(*self._states, strict=True)]
        kinds = {True: iter(states), False: iter(self._kv)}
        self.layers: tuple[LayerCache, ...] = tuple(next(kinds[kept]) for kept in keeps_state)

    def _state_views(self, states: StateMemory, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution's and the recurrent part of the states, layers and slots first."""
        leading = (states.layers, states.slots)
        recurrent_offset = offset + states.convolution_bytes
        return (
            self._arena.view(offset, (*leading, *states.shape.convolution), states.dtype),
            self._arena.view(recurrent_offset, (*leading, *states.shape.recurrent), torch.float32),
        )

    @property
    def bytes(self) -> int:
        """Bytes of the arena."""
        return self._arena.size

    def of_request(self, *, blocks: Sequence[int], slot: int, tokens: int) -> RequestCache:
        """Where a request's cache is, for handing it over.

        Raises:
            ValueError: there is no such block or slot, or the blocks hold fewer tokens.
        """
        size, states = self.shape.block_size, self.shape.states
        if any(block >= self.num_blocks for block in blocks):
            raise ValueError(f"block {max(blocks)} is out of range: there are {self.num_blocks}")
        if not 0 < tokens <= len(blocks) * size:
            raise ValueError(f"{tokens} tokens in {len(blocks)} blocks of {size}: expected 1 to {len(blocks) * size}")
        if states is not None and slot >= states.slots:
            raise ValueError(f"slot {slot} is out of range: there are {states.slots}")
        kept = [layer for layer in self.layers if isinstance(layer, LayerState)]
        return RequestCache(self._kv, kept, size, tuple(blocks), slot, tokens)

    def copy_blocks(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copies blocks, all layers; sources and targets: int64 on the device, of one length."""
        for layer in self._kv:
            for part in (layer.keys, layer.values):
                part.index_copy_(0, targets, part.index_select(0, sources))

    def reset_states(self, slots: Sequence[int]) -> None:
        """Makes slots begin with the state of an empty sequence: what an earlier one left must not be seen."""
        if self._states and slots:
            (index,) = upload([np.array(slots, dtype=np.int64)], self._arena.device)
            for part in self._states:
                part.index_fill_(1, index, 0)

    def close(self) -> int:
        """Gives the memory back, here and at the supervisor; returns how many bytes. The views must be gone by then."""
        size = self._arena.size
        self.layers, self._kv, self._states = (), (), ()
        self._arena.close()
        self._arenas.release(self._arena.id)
        return size
