"""From a model config to a model whose weights lie in this rank's arena."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.keeper import ArenaKeeper
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.loading.checkpoint_files import read_checkpoint
from tpmodel_worker.loading.digest import digest_bytes, shard_digest, unsigned
from tpmodel_worker.loading.dummy import fill_dummy
from tpmodel_worker.loading.persisted import PersistedWeightsError, ShardFiles
from tpmodel_worker.loading.plan import ArenaPlan, bind_parameters, plan_weights, target_view
from tpmodel_worker.loading.safetensors_reader import check_tensors, copy_tensors
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config import ModelConfig
from tpmodel_worker.models.registry import build_model

Progress = Callable[[str, int, int], None]
"""Called with what is going on ("weights" or "digest"), bytes done and bytes in all."""


@dataclass(frozen=True, slots=True)
class PersistedShard:
    """Weights that an update has left in a file."""

    files: ShardFiles
    version: int


LoadFormat = Literal["safetensors", "dummy"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model, the arena that holds its weights, and how they came there."""

    model: CausalLanguageModel
    arena: Arena
    bytes: int
    """Bytes of the arena that are tensors."""
    bytes_read: int
    """Bytes copied out of files; 0 where the arena was mapped again, or filled without files."""
    digest: int
    """Sum of the tensors' digests modulo 2^64."""
    mapped: bool
    """True when a complete arena was found, checked and mapped."""
    weight_version: int | None = 0
    """0: the checkpoint; None: an update was broken off, the weights are of no use before a full set has come."""


def load_model(
    config: ModelConfig,
    *,
    rank: int,
    world_size: int,
    communicator: Communicator,
    device: torch.device,
    dtype: torch.dtype,
    load_format: LoadFormat,
    paths: Sequence[str | Path],
    dummy_seed: int,
    arenas: ArenaKeeper,
    model_id: str,
    progress: Progress,
    persisted: PersistedShard | None = None,
) -> LoadedModel:
    """Maps this rank's weights where the supervisor still holds them whole, else makes them.

    Args:
        config: checked for world_size.
        rank: of this process.
        world_size: ranks that share the model.
        communicator: of the current epoch; `model.bind` takes a later one.
        device: where arena and model lie.
        dtype: to compute in; weights are converted.
        load_format: "safetensors" reads `paths`, "dummy" draws weights (loading/dummy.py).
        paths: the checkpoint's safetensors files.
        dummy_seed: of load_format "dummy".
        arenas: the supervisor's side.
        model_id: what the checkpoint is known by; weights of another one are never mapped.
        progress: hears of bytes done.
        persisted: committed weights that take the checkpoint's place.

    Raises:
        PersistedWeightsError: those are not whole, or not this model's; nothing stays at the supervisor.
        CheckpointError: a file or tensor is not what the config asks for; nothing stays at the supervisor.
        ArenaError: the memory cannot be had, or the supervisor is gone.
        ValueError: the communicator is not this rank's, or an unknown load_format.
    """
    if (communicator.rank, communicator.world_size) != (rank, world_size):
        raise ValueError(f"rank {rank} of {world_size} got the communicator of rank {communicator.rank}")
    if load_format not in ("safetensors", "dummy"):
        raise ValueError(f"load_format {load_format!r} is not safetensors or dummy")
    model = build_model(config, communicator=communicator, dtype=dtype)
    plan = plan_weights(model)
    arena_id = ArenaId(rank, "weights", 0)
    wanted = worker_pb2.ArenaManifest(
        id=arena_id.to_proto(),
        bytes=plan.size,
        device=str(device),
        state=worker_pb2.ARENA_STATE_LOADING,
        layout_hash=plan.layout_hash,
        # Dummy weights of another seed are another model's.
        model_id=model_id if load_format == "safetensors" else f"{model_id} (dummy weights, seed {dummy_seed})",
    )
    mapped = _map_held(arenas, wanted, plan, device, progress)
    held_version: int | None = 0
    version = 0
    if mapped is not None:
        arena, digests, held_version = mapped
        bytes_read = 0
    else:
        with contextlib.ExitStack() as undo:
            arena = Arena.create(arena_id, plan.size, device)
            undo.callback(arena.close)
            if device.type == "cuda":
                arena.bytes.zero_()  # padding rows have to be zero, as new host memory is
            arenas.store(arena, wanted)
            undo.callback(arenas.release, arena_id)
            if persisted is not None:
                digests = _read_persisted(persisted, wanted, plan, arena, progress)
                version, bytes_read = persisted.version, plan.size
            else:
                if load_format == "safetensors":
                    entries = read_checkpoint(paths)
                    plan = plan_weights(model, entries)
                    check_tensors(plan, entries)
                    report = functools.partial(progress, "weights")
                    bytes_read = copy_tensors(plan, entries, arena, report)
                else:
                    _fill_with_dummies(plan, arena, dummy_seed, progress)
                    bytes_read = 0
                digests = digest_tensors(plan, arena, progress)
            arenas.update_manifest(completed_manifest(wanted, arena, digests, version=version))
            undo.pop_all()
    bind_parameters(model, plan, arena)
    return LoadedModel(
        model=model,
        arena=arena,
        bytes=plan.tensor_bytes,
        bytes_read=bytes_read,
        digest=shard_digest(digests),
        mapped=mapped is not None,
        weight_version=held_version if mapped is not None else version,
    )


def _map_held(
    arenas: ArenaKeeper,
    wanted: worker_pb2.ArenaManifest,
    plan: ArenaPlan,
    device: torch.device,
    progress: Progress,
) -> tuple[Arena, dict[str, int], int | None] | None:
    """The arena that the supervisor holds, with digests and version, if it is what is wanted; else has it released.

    One that a live update was filling is mapped as it is, at no version: the checkpoint must not take the
    place of newer weights in silence.
    """
    arena_id = ArenaId.from_proto(wanted.id)
    found = arenas.fetch(arena_id)
    if found is None:
        return None
    descriptor, manifest = found
    # Takes the descriptor over: close gives it back.
    try:
        arena = Arena.map(arena_id, descriptor, manifest.bytes, device)
    except ArenaError as error:
        _logger.warning("%s cannot be mapped, loading anew: %s", arena_id, error)
        arenas.release(arena_id)
        return None
    reason = manifest_difference(wanted, manifest, plan)
    if reason is None and manifest.state == worker_pb2.ARENA_STATE_UPDATING:
        _logger.warning("%s was being updated: it waits for a full set of weights", arena_id)
        return arena, {}, None
    if reason is None:
        digests = digest_tensors(plan, arena, progress)
        recorded = {entry.name: entry.digest for entry in manifest.digests}
        changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
        if not changed:
            return arena, digests, manifest.weight_version
        reason = f"tensor {changed[0]} is not what was loaded"
    _logger.warning("%s is not mapped again, loading anew: %s", arena_id, reason)
    arena.close()
    arenas.release(arena_id)
    return None


def _read_persisted(
    persisted: PersistedShard,
    wanted: worker_pb2.ArenaManifest,
    plan: ArenaPlan,
    arena: Arena,
    progress: Progress,
) -> dict[str, int]:
    """Fills the arena out of the file, and checks what has come; the digests."""
    manifest = persisted.files.describe(persisted.version)
    what = f"version {persisted.version} in {persisted.files.folder}"
    reason = manifest_difference(wanted, manifest, plan)
    if reason is not None:
        raise PersistedWeightsError(f"{what}: {reason}")
    persisted.files.read(persisted.version, arena.bytes[: plan.size], functools.partial(progress, "weights"))
    digests = digest_tensors(plan, arena, progress)
    recorded = {entry.name: entry.digest for entry in manifest.digests}
    changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
    if changed:
        raise PersistedWeightsError(f"{what}: tensor {changed[0]} is not what was written")
    return digests


def manifest_difference(
    wanted: worker_pb2.ArenaManifest, manifest: worker_pb2.ArenaManifest, plan: ArenaPlan
) -> str | None:
    """Why an arena that a manifest describes is of no use for a plan; None: it is."""
    if manifest.state not in (worker_pb2.ARENA_STATE_COMPLETE, worker_pb2.ARENA_STATE_UPDATING):
        return f"its state is {worker_pb2.ArenaState.Name(manifest.state)}"
    for field in ("layout_hash", "model_id", "quantization"):
        if getattr(manifest, field) != getattr(wanted, field):
            return f"its {field} is {getattr(manifest, field)!r}, wanted {getattr(wanted, field)!r}"
    if manifest.bytes < plan.size:
        return f"it has {manifest.bytes} bytes, wanted {plan.size}"
    return None


def _fill_with_dummies(plan: ArenaPlan, arena: Arena, seed: int, progress: Progress) -> None:
    targets = [target_view(planned, plan, arena) for planned in plan.parts]
    total = sum(target.numel() * target.element_size() for target in targets)
    done = 0
    for planned, target in zip(plan.parts, targets, strict=True):
        part = planned.part
        fill_dummy(target, seed, part.checkpoint_name, part.shape, dimension=part.dimension, start=part.start)
        done += target.numel() * target.element_size()
        progress("weights", done, total)


def digest_tensors(plan: ArenaPlan, arena: Arena, progress: Progress) -> dict[str, int]:
    """The digest of every tensor of the arena, padding rows included."""
    done, total = 0, plan.tensor_bytes
    sums: list[torch.Tensor] = []
    for tensor in plan.tensors.values():
        sums.append(digest_bytes(arena.bytes[tensor.offset : tensor.offset + tensor.size]))
        done += tensor.size
        progress("digest", done, total)
    return {name: unsigned(value) for name, value in zip(plan.tensors, torch.stack(sums).tolist(), strict=True)}


def completed_manifest(
    wanted: worker_pb2.ArenaManifest, arena: Arena, digests: dict[str, int], *, version: int = 0
) -> worker_pb2.ArenaManifest:
    """The manifest of an arena that holds whole weights of that version."""
    manifest = worker_pb2.ArenaManifest()
    manifest.CopyFrom(wanted)
    manifest.bytes = arena.size
    manifest.state = worker_pb2.ARENA_STATE_COMPLETE
    manifest.weight_version = version
    del manifest.digests[:]
    manifest.digests.extend(worker_pb2.TensorDigest(name=name, digest=digest) for name, digest in digests.items())
    return manifest
