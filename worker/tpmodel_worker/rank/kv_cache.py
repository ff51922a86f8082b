"""The caches of one rank in one arena: paged KV, and the state of linear-attention layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.keeper import ArenaKeeper
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.kv.transfer import RequestCache
from tpmodel_worker.models.batch import LayerCache, LayerKvCache, LayerState
from tpmodel_worker.rank.cache_sizes import SCRATCH_BLOCKS, KvShape, StateMemory, aligned
from tpmodel_worker.rank.upload import upload


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
        total = num_blocks + SCRATCH_BLOCKS
        kv_bytes = total * shape.block_bytes
        if shape.states is not None:
            kv_bytes = aligned(kv_bytes)
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
        """The convolution's and the recurrent part of the states, layers and slots first, snapshots behind slots."""
        leading = (states.layers, states.rows)
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

    def restore_states(self, snapshots: Sequence[int], slots: Sequence[int]) -> None:
        """Copies snapshots into slots, one each."""
        self._copy_states([self._snapshot_row(snapshot) for snapshot in snapshots], slots)

    def save_states(self, slots: Sequence[int], snapshots: Sequence[int]) -> None:
        """Copies the states of slots into snapshots, one each."""
        self._copy_states(slots, [self._snapshot_row(snapshot) for snapshot in snapshots])

    def _snapshot_row(self, snapshot: int) -> int:
        states = self.shape.states
        assert states is not None, "only what keeps a state has snapshots of it"
        return states.slots + snapshot

    def _copy_states(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        rows = [np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)]
        source_rows, target_rows = upload(rows, self._arena.device)
        for part in self._states:
            part.index_copy_(1, target_rows, part.index_select(1, source_rows))

    def close(self) -> int:
        """Gives the memory back, here and at the supervisor; returns how many bytes. The views must be gone by then."""
        size = self._arena.size
        self.layers, self._kv, self._states = (), (), ()
        self._arena.close()
        self._arenas.release(self._arena.id)
        return size
