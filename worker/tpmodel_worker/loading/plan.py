"""What a rank's weights arena holds, planned from the model's shapes before a byte is read."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.sharding import ShardedModule, TensorPart

ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class ArenaTensor:
    """One parameter's place in the arena."""

    name: str
    offset: int
    """Bytes; a multiple of ALIGNMENT."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A part of a checkpoint tensor (its full name) and the parameter that it belongs to."""

    part: TensorPart
    target: str

    @property
    def elements(self) -> int:
        """Elements of the part."""
        return math.prod(self.part.shape) // self.part.shape[self.part.dimension] * self.part.length


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """Places of all parameters, and which parts of which checkpoint tensors fill them."""

    tensors: Mapping[str, ArenaTensor]
    parts: tuple[PlannedPart, ...]
    shapes: Mapping[str, tuple[int, ...]]
    """Of every checkpoint tensor of the model, also of those that this rank needs nothing of."""
    aliases: Mapping[str, tuple[int, ...]]
    """Checkpoint tensors that stand for a parameter another one fills (tied weights), with their shapes."""
    unused: tuple[str, ...]
    """Beginnings of names of checkpoint tensors that other uses of the checkpoint need."""
    size: int
    """Bytes of the arena."""
    layout_hash: str

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the arena that are tensors."""
        return sum(tensor.size for tensor in self.tensors.values())


def plan_weights(model: nn.Module, checkpoint: Collection[str] = ()) -> ArenaPlan:
    """Plans the arena of a model whose parameters may be on the meta device.

    Args:
        model: its layers say what they need.
        checkpoint: names of the tensors that are there; they decide where a layer can be stored in several ways.
            The arena is the same for all of them.

    Raises:
        ValueError: a parameter belongs to no ShardedModule, so that nothing would fill it.
    """
    tensors: dict[str, ArenaTensor] = {}
    parts: list[PlannedPart] = []
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, tuple[int, ...]] = {}
    planned: set[int] = set()
    end = 0
    for path, module in model.named_modules():
        if not isinstance(module, ShardedModule):
            continue
        parent, _, name = path.rpartition(".")
        layer_parts = _stored_layout(module, name, parent, checkpoint)
        if id(module.weight) in planned:
            aliases |= {part.checkpoint_name: part.shape for part in layer_parts}
            continue
        planned.add(id(module.weight))
        tensor = ArenaTensor(f"{path}.weight", end, tuple(module.weight.shape), module.weight.dtype)
        tensors[tensor.name] = tensor
        shapes |= {part.checkpoint_name: part.shape for part in layer_parts}
        parts += [PlannedPart(part, tensor.name) for part in layer_parts if part.length > 0]
        end += -(-tensor.size // ALIGNMENT) * ALIGNMENT
    for name, parameter in model.named_parameters():
        if id(parameter) not in planned:
            raise ValueError(f"parameter {name} belongs to no sharded layer")
    unused = model.unused_tensors if isinstance(model, CausalLanguageModel) else ()
    return ArenaPlan(tensors, tuple(parts), shapes, aliases, unused, end, _layout_hash(tensors))


def bind_parameters(model: nn.Module, plan: ArenaPlan, arena: Arena) -> None:
    """Makes the model's parameters views of the arena and moves its buffers to the arena's device."""
    bound: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        if isinstance(module, ShardedModule):
            meta = id(module.weight)
            if meta not in bound:
                tensor = plan.tensors[f"{path}.weight"]
                view = arena.view(tensor.offset, tensor.shape, tensor.dtype)
                bound[meta] = nn.Parameter(view, requires_grad=False)
            module.weight = bound[meta]
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(arena.device))


def target_view(planned: PlannedPart, plan: ArenaPlan, arena: Arena) -> torch.Tensor:
    """Where in the arena a part goes, in the part's shape."""
    tensor = plan.tensors[planned.target]
    return planned.part.within(arena.view(tensor.offset, tensor.shape, tensor.dtype))


def _stored_layout(module: ShardedModule, name: str, parent: str, checkpoint: Collection[str]) -> list[TensorPart]:
    """The first of the layer's layouts that the checkpoint has a tensor of; where it has none, the very first."""
    layouts = [[_with_prefix(part, parent) for part in layout] for layout in module.layouts(name)]
    return next(
        (layout for layout in layouts if any(part.checkpoint_name in checkpoint for part in layout)), layouts[0]
    )


def _with_prefix(part: TensorPart, parent: str) -> TensorPart:
    return dataclasses.replace(part, checkpoint_name=f"{parent}.{part.checkpoint_name}") if parent else part


def _layout_hash(tensors: Mapping[str, ArenaTensor]) -> str:
    lines = [f"{tensor.name} {tensor.offset} {tensor.shape} {tensor.dtype}" for tensor in tensors.values()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
