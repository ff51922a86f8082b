"""How large a rank's caches may be: paged KV, and the state of linear-attention layers beside it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.host import free_host_bytes
from tpmodel_worker.models.batch import StateShape
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.rank.errors import RequestError

_HOST_FRACTION = 0.25
_HOST_MOST_BYTES = 4 << 30
_DEVICE_FRACTION = 0.9
SCRATCH_BLOCKS = 1
"""Of every cache: idle slots write there."""
_SNAPSHOT_FRACTION = 0.1
"""Of the memory beside the slots' states."""
_SNAPSHOTS_PER_SLOT = 4
"""More would hold the state of prompts whose blocks have long gone."""
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class StateMemory:
    """What the linear-attention layers keep of all slots and snapshots on one rank."""

    shape: StateShape
    layers: int
    slots: int
    dtype: torch.dtype
    """Of the convolution's features; the recurrent state is float32."""
    snapshots: int = 0
    """Copies of a slot's state that are kept beside those of the slots."""

    @property
    def rows(self) -> int:
        """Slots and snapshots: snapshot 0 comes after the last slot."""
        return self.slots + self.snapshots

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of one more snapshot, but for rounding."""
        return self._convolution_row_bytes + self._recurrent_row_bytes

    @property
    def convolution_bytes(self) -> int:
        """Bytes of the features that convolutions look back at."""
        return aligned(self.rows * self._convolution_row_bytes)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of the recurrent state."""
        return aligned(self.rows * self._recurrent_row_bytes)

    @property
    def _convolution_row_bytes(self) -> int:
        return self.layers * math.prod(self.shape.convolution) * self.dtype.itemsize

    @property
    def _recurrent_row_bytes(self) -> int:
        return self.layers * math.prod(self.shape.recurrent) * torch.float32.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of both."""
        return self.convolution_bytes + self.recurrent_bytes


@dataclass(frozen=True, slots=True)
class KvShape:
    """What one token's K and V take on one rank, and what all states take beside them."""

    layers: int
    """Those that keep K and V."""
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype
    states: StateMemory | None = None

    @classmethod
    def of_model(
        cls, model: CausalLanguageModel, *, block_size: int, dtype: torch.dtype, slots: int, snapshots: int = 0
    ) -> KvShape:
        """What this rank's shard of a model keeps; slots, snapshots: as in StateMemory, where it keeps a state."""
        states = None
        if model.state_shape is not None:
            states = StateMemory(model.state_shape, sum(model.keeps_state), slots, dtype, snapshots)
        return cls(
            layers=model.keeps_state.count(False),
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            block_size=block_size,
            dtype=dtype,
            states=states,
        )

    @property
    def snapshots(self) -> int:
        """Snapshots of recurrent state."""
        return self.states.snapshots if self.states is not None else 0

    def with_snapshots(self, count: int) -> KvShape:
        """The same with so many of them, where a state is kept."""
        return self if self.states is None else replace(self, states=replace(self.states, snapshots=count))

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of all slots and snapshots; 0 where no layer keeps one."""
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
    state_snapshots: int | None = None
    """Snapshots of recurrent state, for models that keep one; None: by what is free."""


def available_snapshots(shape: KvShape, demand: KvDemand, device: torch.device) -> int:
    """Snapshots of recurrent state beside the slots' own: those asked for, else what a part of the memory holds.

    shape: with the slots' states alone.
    """
    if shape.states is None:
        return 0
    if demand.state_snapshots is not None:
        return demand.state_snapshots
    room = (demand.kv_cache_bytes or _free_bytes(demand, device)) - shape.state_bytes
    most = int(_SNAPSHOT_FRACTION * max(0, room)) // shape.states.snapshot_bytes
    return min(most, _SNAPSHOTS_PER_SLOT * demand.max_num_seqs)


def available_blocks(shape: KvShape, demand: KvDemand, device: torch.device) -> int:
    """Blocks that the cache can have beside its scratch block and all states.

    Without kv_cache_bytes never more than max_num_seqs sequences of max_model_len tokens need.

    Raises:
        RequestError: the memory does not hold one sequence of one block (out of memory), or kv_cache_bytes can never
            work here (invalid argument); names the numbers.
    """
    least = (1 + SCRATCH_BLOCKS) * shape.block_bytes + shape.state_bytes
    states = _states_in_words(shape)
    if demand.kv_cache_bytes:
        _check_kv_cache_bytes(demand, device, least, states)
        return (demand.kv_cache_bytes - shape.state_bytes) // shape.block_bytes - SCRATCH_BLOCKS
    free = _free_bytes(demand, device)
    if free < least:
        raise RequestError(
            pb.ERROR_KIND_OUT_OF_MEMORY,
            f"a KV cache needs at least {least} bytes on each rank{states}, {free} are free",
        )
    blocks = (free - shape.state_bytes) // shape.block_bytes - SCRATCH_BLOCKS
    return min(blocks, demand.max_num_seqs * -(-demand.max_model_len // shape.block_size))


def _states_in_words(shape: KvShape) -> str:
    if shape.states is None:
        return ""
    snapshots = f" and {shape.states.snapshots} snapshots" if shape.states.snapshots else ""
    return (
        f" ({shape.state_bytes} of them for the recurrent state of max_num_seqs = {shape.states.slots} sequences"
        f"{snapshots})"
    )


def aligned(size: int) -> int:
    """The bytes that a part of an arena takes up."""
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
