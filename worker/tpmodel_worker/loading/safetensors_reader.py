"""Copies a rank's parts out of safetensors files into its arena."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.checkpoint_files import TensorEntry
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.plan import ArenaPlan, PlannedPart, target_view

CHUNK_BYTES = 32 << 20
"""Bytes copied at a time, into the arena or through one of two pinned buffers."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)

# Buffers that some writers store, and every model computes from its config.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq",)


def check_tensors(plan: ArenaPlan, entries: Mapping[str, TensorEntry]) -> None:
    """Compares the tensors of a checkpoint with those of the model.

    Tensors that tied weights make redundant, buffers that are computed from the config, and what the plan says is
    unused may be there.

    Raises:
        CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    for name, shape in plan.shapes.items():
        entry = entries.get(name)
        if entry is None:
            files = ", ".join(sorted({str(other.file) for other in entries.values()}))
            raise CheckpointError(f"{files}: tensor {name} is missing")
        if entry.shape != shape:
            raise CheckpointError(f"{entry.file}: tensor {name} has shape {entry.shape}, the config gives {shape}")
    for name, entry in entries.items():
        if name in plan.shapes or name.endswith(_COMPUTED_SUFFIXES) or name.startswith(plan.unused):
            continue
        if name not in plan.aliases:
            raise CheckpointError(f"{entry.file}: unexpected tensor {name}: no layer of the model has it")
        if entry.shape != plan.aliases[name]:
            raise CheckpointError(
                f"{entry.file}: tensor {name} has shape {entry.shape}, the weight it is tied to {plan.aliases[name]}"
            )


def copy_tensors(
    plan: ArenaPlan, entries: Mapping[str, TensorEntry], arena: Arena, progress: Callable[[int, int], None]
) -> int:
    """Fills the arena, converting dtypes; check_tensors has passed.

    File pages are mapped, not read into buffers: beside the arena only bounded memory is taken.

    Args:
        plan: of this rank.
        entries: of all files.
        arena: where the tensors go.
        progress: called with bytes done and bytes in all.

    Returns:
        Bytes copied out of the files: those of this rank's parts alone.

    Raises:
        CheckpointError: a file cannot be mapped any more.
    """
    # In the order in which they lie in the files, so that reading ahead helps.
    planned = sorted(plan.parts, key=lambda item: _place(entries[item.part.checkpoint_name]))
    total = sum(item.elements * DTYPES[entries[item.part.checkpoint_name].dtype].itemsize for item in planned)
    copy = _device_copier(arena.device) if arena.device.type == "cuda" else torch.Tensor.copy_
    done = 0
    mapped: tuple[Path, mmap.mmap] | None = None
    for item in planned:
        entry = entries[item.part.checkpoint_name]
        if mapped is None or mapped[0] != entry.file:
            mapped = entry.file, _map_file(entry.file)
        source, target = _source_view(item, entry, mapped[1]), target_view(item, plan, arena)
        for source_rows, target_rows in _chunks(source, target):
            copy(target_rows, source_rows)
            done += source_rows.numel() * source_rows.element_size()
            progress(done, total)
    if arena.device.type == "cuda":
        torch.cuda.synchronize(arena.device)
    return done


def _place(entry: TensorEntry) -> tuple[Path, int]:
    return entry.file, entry.offset


def _map_file(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            # A private mapping may be written to, which is all that torch asks; nothing is written.
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"{path}: {error}") from error
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    return mapping


def _source_view(item: PlannedPart, entry: TensorEntry, mapping: mmap.mmap) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    whole = torch.frombuffer(mapping, dtype=dtype, count=entry.size // dtype.itemsize, offset=entry.offset)
    return whole.view(entry.shape).narrow(item.part.dimension, item.part.start, item.part.length)


def _chunks(source: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of both, CHUNK_BYTES or one row at a time."""
    row_bytes = source[0].numel() * max(source.element_size(), target.element_size())
    step = max(CHUNK_BYTES // row_bytes, 1)
    yield from zip(source.split(step), target.split(step), strict=True)


def _device_copier(device: torch.device) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Copies through two pinned buffers in turn, so that filling one overlaps sending the other."""
    stream = torch.cuda.current_stream(device)
    buffers = [torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    sent = [torch.cuda.Event() for _ in range(2)]
    turn = 0

    def copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        nonlocal turn
        turn = 1 - turn
        size = target.numel() * target.element_size()
        if size > buffers[turn].numel():
            buffers[turn] = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        sent[turn].synchronize()
        staged = buffers[turn][:size].view(target.dtype).view(target.shape)
        staged.copy_(source)
        target.copy_(staged, non_blocking=True)
        sent[turn].record(stream)
        return target

    return copy
