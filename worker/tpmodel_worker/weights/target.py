"""Where the tensors of an update go: the parts of this rank, by the map that loading uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tpmodel.v1 import weights_pb2
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.plan import ArenaPlan, PlannedPart, target_view
from tpmodel_worker.weights.packing import TensorInfo

Target = tuple[PlannedPart, torch.Tensor]


class WeightTarget:
    """An arena that is being filled out of full checkpoint tensors."""

    def __init__(self, plan: ArenaPlan, arena: Arena) -> None:
        self.plan = plan
        self.arena = arena
        self._targets: dict[str, list[Target]] = {}
        for planned in plan.parts:
            place = target_view(planned, plan, arena)
            self._targets.setdefault(planned.part.checkpoint_name, []).append((planned, place))

    def load(self, name: str, tensor: torch.Tensor) -> None:
        """Cuts this rank's parts out of a full tensor, converting its dtype; tied names have none of their own."""
        for planned, place in self._targets.get(name, ()):
            part = planned.part
            place.copy_(tensor.narrow(part.dimension, part.start, part.length))


def check_tensors(plan: ArenaPlan, tensors: Sequence[TensorInfo]) -> None:
    """Compares what a trainer is about to send with the model.

    Raises:
        ValueError: the model has no tensor of a name, or one of another shape.
    """
    for tensor in tensors:
        shape = plan.shapes.get(tensor.name, plan.aliases.get(tensor.name))
        if shape is None:
            raise ValueError(f"the model has no tensor {tensor.name}: names are those of the checkpoint")
        if tensor.shape != shape:
            raise ValueError(f"{tensor.name} has shape {tensor.shape}, the model's is {shape}")


def missing_tensors(plan: ArenaPlan, received: set[str]) -> list[str]:
    """What a full set still lacks; tied names may be left out."""
    return [name for name in plan.shapes if name not in received]


def describe_parameters(plan: ArenaPlan) -> list[weights_pb2.ParameterInfo]:
    """All tensors of the model as a trainer knows them; those with nothing here are described as well."""
    dimensions = {
        planned.part.checkpoint_name: planned.part.dimension
        for planned in plan.parts
        if planned.part.length < planned.part.shape[planned.part.dimension]
    }
    dtypes = {planned.part.checkpoint_name: plan.tensors[planned.target].dtype for planned in plan.parts}
    default = next(iter(plan.tensors.values())).dtype
    return [
        weights_pb2.ParameterInfo(
            name=name,
            shape=shape,
            dtype=str(dtypes.get(name, default)).removeprefix("torch."),
            sharded_dimension=dimensions.get(name),
            tied=name in plan.aliases,
        )
        for name, shape in [*plan.shapes.items(), *plan.aliases.items()]
    ]
