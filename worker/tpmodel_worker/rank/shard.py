"""The model shard of a rank and the KV cache beside it: loaded, kept over epochs, and given back."""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.keeper import ArenaKeeper
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kv.layout import KvLayout, StateLayout
from tpmodel_worker.kv.transfer import RequestCache
from tpmodel_worker.loading.load import LoadedModel, LoadFormat, PersistedShard, Progress, load_model
from tpmodel_worker.loading.persisted import ShardFiles
from tpmodel_worker.models.config import ModelConfig, parse_model_config
from tpmodel_worker.rank.cache_sizes import KvDemand, KvShape, available_blocks, available_snapshots
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.kv_cache import KvCache, release_kv_arena
from tpmodel_worker.rank.plan_check import PlanLimits
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.sampling import Sampler
from tpmodel_worker.rank.slots import SlotLimits, SlotTable

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What libraries (NCCL, cuBLAS) and the allocator's rounding take beside the tensors below.
_DEVICE_RESERVE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class _Identity:
    """What must be equal for a loaded model to be kept."""

    model_id: str
    config_json: str
    paths: tuple[str, ...]
    quantization: str
    load_format: str
    dtype: str
    dummy_seed: int
    max_model_len: int
    world_size: int
    expert_parallel: bool


@dataclass(slots=True)
class _Shard:
    identity: _Identity
    loaded: LoadedModel
    config: ModelConfig
    kv_shape: KvShape
    demand: KvDemand
    request: pb.LoadDenseShardRequest
    blocks_available: int = 0


class ShardHolder:
    """At most one model shard and its KV cache. Used by the computing thread only."""

    def __init__(self, *, rank: int, device: torch.device, arenas: ArenaKeeper, device_sharers: int = 1) -> None:
        """device_sharers: ranks that have the same CUDA device, this one included."""
        self._device_sharers = device_sharers
        self._rank = rank
        self._device = device
        self._arenas = arenas
        self._shard: _Shard | None = None
        self._cache: KvCache | None = None

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if there is one."""
        return self._shard.loaded if self._shard is not None else None

    def replace_weights(self, *, arena: Arena, digest: int, version: int | None) -> None:
        """Notes which arena holds the model's weights now, and what they are; version None: they are not whole."""
        assert self._shard is not None, "weights are replaced in a loaded model"
        self._shard.loaded = replace(self._shard.loaded, arena=arena, digest=digest, weight_version=version)

    @property
    def model_id(self) -> str:
        """Of the loaded model; empty without one."""
        return self._shard.identity.model_id if self._shard is not None else ""

    @property
    def kv_blocks(self) -> int:
        """Blocks of the KV cache; 0 before ClearKvCache made one."""
        return self._cache.num_blocks if self._cache is not None else 0

    @property
    def kv_bytes(self) -> int:
        """Bytes of the KV cache's arena."""
        return self._cache.bytes if self._cache is not None else 0

    @property
    def kv_layout(self) -> KvLayout | None:
        """Of the whole gang's cache; None before a model is loaded."""
        return _kv_layout(self._shard) if self._shard is not None else None

    def request_cache(self, *, blocks: Sequence[int], slot: int, tokens: int) -> RequestCache:
        """As KvCache.of_request. Raises RequestError where there is no cache, or no such part of it."""
        if self._cache is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "there is no KV cache: ClearKvCache makes one")
        try:
            return self._cache.of_request(blocks=blocks, slot=slot, tokens=tokens)
        except ValueError as error:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error

    def load(
        self,
        request: pb.LoadDenseShardRequest,
        communicator: Communicator,
        *,
        ranks_on_host: int,
        progress: Progress,
    ) -> pb.LoadDenseShardOk:
        """Loads the shard, or keeps the one that is loaded if it is the same, for this epoch's communicator.

        Raises:
            RequestError: an argument is not supported, or no KV cache fits beside the model.
            ConfigError: the model is not supported.
            CheckpointError, PersistedWeightsError, ArenaError, CommunicatorError: loading failed; nothing is loaded
                then.
        """
        started = time.perf_counter()
        config, dtype_name = _parse(request, communicator.world_size)
        identity = _Identity(
            model_id=request.model_id,
            config_json=request.config_json,
            paths=tuple(request.safetensors_paths),
            quantization=request.quantization,
            load_format=request.load_format,
            dtype=dtype_name,
            dummy_seed=request.dummy_seed,
            max_model_len=request.max_model_len,
            world_size=communicator.world_size,
            expert_parallel=request.expert_parallel,
        )
        kept = self._shard
        if kept is not None and kept.identity == identity:
            loaded = kept.loaded
            loaded.model.bind(communicator)
        else:
            kept = None
            self.unload()
            loaded = load_model(
                config,
                rank=self._rank,
                world_size=communicator.world_size,
                communicator=communicator,
                device=self._device,
                dtype=_DTYPES[dtype_name],
                load_format=_load_format(request.load_format),
                paths=list(request.safetensors_paths),
                dummy_seed=request.dummy_seed,
                arenas=self._arenas,
                model_id=request.model_id,
                progress=progress,
                persisted=_persisted(request, self._rank),
            )
        shard = self._shard = self._describe(request, config, identity, loaded, ranks_on_host)
        if kept is not None and self._cache is not None and kept.demand == shard.demand:
            # What is free now lacks what the cache itself took.
            shard.kv_shape = shard.kv_shape.with_snapshots(kept.kv_shape.snapshots)
            shard.blocks_available = kept.blocks_available
        else:
            self._drop_cache()
            try:
                snapshots = available_snapshots(shard.kv_shape, shard.demand, self._device)
                shard.kv_shape = shard.kv_shape.with_snapshots(snapshots)
                shard.blocks_available = available_blocks(shard.kv_shape, shard.demand, self._device)
            except RequestError:
                self.unload()
                raise
        states = shard.kv_shape.states
        return pb.LoadDenseShardOk(
            bytes=loaded.bytes,
            seconds=time.perf_counter() - started,
            digest=loaded.digest,
            bytes_read=loaded.bytes_read if kept is None else 0,
            mapped=loaded.mapped or kept is not None,
            kv_blocks_available=shard.blocks_available,
            kv_block_bytes=shard.kv_shape.block_bytes,
            state_bytes=shard.kv_shape.with_snapshots(0).state_bytes,
            state_snapshots_available=shard.kv_shape.snapshots,
            state_snapshot_bytes=states.snapshot_bytes if states is not None else 0,
            weight_version=loaded.weight_version,
            kv_layout=_kv_layout(shard).to_message(),
        )

    def _describe(
        self,
        request: pb.LoadDenseShardRequest,
        config: ModelConfig,
        identity: _Identity,
        loaded: LoadedModel,
        ranks_on_host: int,
    ) -> _Shard:
        model, dtype = loaded.model, _DTYPES[identity.dtype]
        shape = KvShape.of_model(model, block_size=request.block_size, dtype=dtype, slots=request.max_num_seqs)
        # Beside them a few copies of the logits.
        token_bytes = config.activations_per_token(identity.world_size) * shape.dtype.itemsize
        demand = KvDemand(
            kv_cache_bytes=request.kv_cache_bytes,
            max_num_seqs=request.max_num_seqs,
            max_model_len=config.max_model_len,
            activation_bytes=_DEVICE_RESERVE_BYTES
            + request.max_num_batched_tokens * token_bytes
            + 4 * request.max_num_seqs * config.vocab_size * torch.float32.itemsize,
            weights_bytes=loaded.bytes,
            ranks_on_host=ranks_on_host,
            ranks_on_device=self._device_sharers,
            state_snapshots=request.state_snapshots if request.HasField("state_snapshots") else None,
        )
        return _Shard(identity=identity, loaded=loaded, config=config, kv_shape=shape, demand=demand, request=request)

    def clear(self, num_blocks: int, communicator: Communicator, *, state_snapshots: int = 0) -> StepRunner:
        """An empty cache of num_blocks (0: all of it as it is) and empty slots, for this epoch's communicator.

        state_snapshots: places for copies of recurrent state, in models that keep one.

        Raises:
            RequestError: no model is loaded, or there is no cache to keep.
            ArenaError: the memory can't be had.
        """
        shard = self._shard
        if shard is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "no model is loaded: LoadDenseShard comes first")
        wanted = num_blocks or self.kv_blocks
        if wanted == 0:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, "num_blocks is 0 and there is no KV cache to keep")
        if not num_blocks and self._cache is not None:
            state_snapshots = self._cache.shape.snapshots
        shape = shard.kv_shape.with_snapshots(state_snapshots)
        if self._cache is None or self._cache.num_blocks != wanted or self._cache.shape != shape:
            self._drop_cache()
            self._cache = KvCache(
                shape,
                wanted,
                keeps_state=shard.loaded.model.keeps_state,
                rank=self._rank,
                device=self._device,
                arenas=self._arenas,
            )
        return self._runner(shard, self._cache, communicator)

    def _runner(self, shard: _Shard, cache: KvCache, communicator: Communicator) -> StepRunner:
        request, model = shard.request, shard.loaded.model
        limits = SlotLimits(
            max_slots=request.max_num_seqs,
            block_size=request.block_size,
            max_blocks=-(-shard.config.max_model_len // request.block_size),
            num_blocks=cache.num_blocks,
            snapshots=cache.shape.snapshots,
        )
        sampler = Sampler(
            communicator,
            vocab_size=shard.config.vocab_size,
            vocab_start=model.vocab_start,
            vocab_shard=model.vocab_shard,
            max_slots=limits.max_slots,
            device=self._device,
        )
        return StepRunner(
            model=model,
            cache=cache,
            slots=SlotTable(limits, self._device),
            sampler=sampler,
            limits=PlanLimits(
                limits,
                shard.config.vocab_size,
                request.max_num_batched_tokens,
                keeps_state=model.state_shape is not None,
            ),
            device=self._device,
        )

    def unload(self) -> int:
        """Gives the memory of weights and KV cache back, here and at the supervisor; returns how many bytes.

        The caller has dropped its StepRunner before.
        """
        freed = self._drop_cache()
        shard, self._shard = self._shard, None
        if shard is not None:
            arena = shard.loaded.arena
            freed += arena.size
            # The parameters are views of the arena, and modules refer to each other in cycles.
            del shard
            gc.collect()
            arena.close()
            self._arenas.release(arena.id)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
        return freed

    def _drop_cache(self) -> int:
        cache, self._cache = self._cache, None
        if cache is not None:
            return cache.close()
        # A process of this rank that has ended may have left one with the supervisor.
        release_kv_arena(self._rank, self._arenas)
        return 0


def _kv_layout(shard: _Shard) -> KvLayout:
    config, shape = shard.config, shard.kv_shape
    linear, state = config.linear_attention, None
    if linear is not None:
        state = StateLayout(
            layers=len(linear.layers),
            key_heads=linear.key_heads,
            value_heads=linear.value_heads // linear.key_heads,
            key_dim=linear.key_head_dim,
            value_dim=linear.value_head_dim,
            taps=linear.convolution - 1,
        )
    return KvLayout(
        model_id=shard.identity.model_id,
        config_digest=hashlib.sha256(shard.identity.config_json.encode()).hexdigest(),
        dtype=str(shape.dtype).removeprefix("torch."),
        layers=shape.layers,
        kv_heads=config.num_key_value_heads,
        head_dim=shape.head_dim,
        block_size=shape.block_size,
        ranks=shard.identity.world_size,
        state=state,
    )


def _persisted(request: pb.LoadDenseShardRequest, rank: int) -> PersistedShard | None:
    if not request.persisted_version:
        return None
    return PersistedShard(ShardFiles(Path(request.persist_folder), rank), request.persisted_version)


def _parse(request: pb.LoadDenseShardRequest, world_size: int) -> tuple[ModelConfig, str]:
    """The checked config and the name of the dtype to compute in."""
    if request.quantization:
        raise RequestError(
            pb.ERROR_KIND_UNSUPPORTED_MODEL, f"quantization {request.quantization!r} is not supported; supported: none"
        )
    for name in ("max_num_seqs", "max_num_batched_tokens", "block_size"):
        if getattr(request, name) < 1:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"{name} is {getattr(request, name)}: at least 1")
    try:
        config = parse_model_config(
            json.loads(request.config_json),
            world_size=world_size,
            max_model_len=request.max_model_len,
            expert_parallel=request.expert_parallel,
        )
    except json.JSONDecodeError as error:
        raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"config_json is not JSON: {error}") from error
    dtype = request.dtype or config.dtype
    if dtype not in _DTYPES:
        raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    return config, dtype


def _load_format(name: str) -> LoadFormat:
    match name:
        case "safetensors" | "dummy":
            return name
        case _:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"load_format {name!r} is not safetensors or dummy")
