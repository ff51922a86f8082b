"""Mixture of experts: a router that every rank computes, and experts that ranks share.

Every rank holds a part of the intermediate features of each expert, or some experts whole (expert parallelism). Either
way its output is a share of the sum: one all-reduce.
"""

from __future__ import annotations

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.experts import mix_experts, route
from tpmodel_worker.models.config_types import ExpertsConfig
from tpmodel_worker.models.feed_forward import SwigluMlp
from tpmodel_worker.models.layers import CommunicatingModule, ReplicatedLinear
from tpmodel_worker.models.sharding import ShardedModule, TensorPart, divide, empty_weight


class Router(ReplicatedLinear):
    """Chooses the experts of each token: those with the highest probabilities."""

    def __init__(self, experts: ExpertsConfig, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, experts.count, dtype=dtype)
        self.per_token = experts.per_token
        self.normalise = experts.normalise_weights

    def route(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(T, hidden size) -> expert ids (T, k) int64 and their weights (T, k) in hidden's dtype."""
        return route(self(hidden), self.per_token, normalise=self.normalise)


class ExpertShard:
    """What one rank holds of the experts: a part of the features of each, or (whole) some experts with all features."""

    def __init__(self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator) -> None:
        self.total = experts.count
        self.total_features = experts.intermediate_size
        self.hidden_size = hidden_size
        self.whole = experts.whole
        rank, world_size = communicator.rank, communicator.world_size
        self.count = divide(self.total, world_size) if self.whole else self.total
        """Experts of this rank."""
        self.first = rank * self.count if self.whole else 0
        """The lowest of them."""
        self.features = self.total_features if self.whole else divide(self.total_features, world_size)
        """Of each expert."""
        self.start = 0 if self.whole else rank * self.features
        """The lowest of them."""

    def single_part(self, expert: int, projection: str, dimension: int, offset: int) -> TensorPart:
        """This rank's part of the tensor that holds one expert's projection; nothing of an expert of another rank."""
        here = self.first <= expert < self.first + self.count
        shape = [self.hidden_size, self.hidden_size]
        shape[dimension] = self.total_features
        return TensorPart(
            checkpoint_name=f"{expert}.{projection}.weight",
            shape=tuple(shape),
            dimension=dimension,
            start=self.start,
            length=self.features if here else 0,
            offset=offset,
            stack_index=expert - self.first if here else 0,
        )

    def whole_part(self, name: str, shape: tuple[int, ...]) -> TensorPart:
        """Of a tensor that stacks all experts those of this rank."""
        return TensorPart(checkpoint_name=name, shape=shape, dimension=0, start=self.first, length=self.count)


class ExpertsGateUp(ShardedModule):
    """The gate and up projections of this rank's experts: (experts, 2 * features, hidden size)."""

    def __init__(self, shard: ExpertShard, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.shard = shard
        self.weight = empty_weight(shard.count, 2 * shard.features, shard.hidden_size, dtype=dtype)

    def parts(self, name: str) -> list[TensorPart]:
        """Of the tensor that stacks all experts, a range of gate rows and the same of up rows; or some experts."""
        shard = self.shard
        shape = (shard.total, 2 * shard.total_features, shard.hidden_size)
        if shard.whole:
            return [shard.whole_part(name, shape)]
        return [
            TensorPart(
                checkpoint_name=name,
                shape=shape,
                dimension=1,
                start=index * shard.total_features + shard.start,
                length=shard.features,
                offset=index * shard.features,
            )
            for index in range(2)
        ]

    def layouts(self, name: str) -> list[list[TensorPart]]:
        """All experts in one tensor, or two tensors for each expert."""
        shard = self.shard
        single = [
            shard.single_part(expert, projection, dimension=0, offset=index * shard.features)
            for expert in range(shard.total)
            for index, projection in enumerate(("gate_proj", "up_proj"))
        ]
        return [self.parts(name), single]


class ExpertsDown(ShardedModule):
    """The down projections of this rank's experts: (experts, hidden size, features)."""

    def __init__(self, shard: ExpertShard, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.shard = shard
        self.weight = empty_weight(shard.count, shard.hidden_size, shard.features, dtype=dtype)

    def parts(self, name: str) -> list[TensorPart]:
        """A range of columns of the tensor that stacks all experts; or some experts."""
        shard = self.shard
        shape = (shard.total, shard.hidden_size, shard.total_features)
        if shard.whole:
            return [shard.whole_part(name, shape)]
        return [TensorPart(checkpoint_name=name, shape=shape, dimension=2, start=shard.start, length=shard.features)]

    def layouts(self, name: str) -> list[list[TensorPart]]:
        """All experts in one tensor, or one tensor for each expert."""
        shard = self.shard
        single = [shard.single_part(expert, name, dimension=1, offset=0) for expert in range(shard.total)]
        return [self.parts(name), single]


class Experts(nn.Module):
    """What this rank holds of the experts."""

    def __init__(self, shard: ExpertShard, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = shard.first if shard.whole else None
        self.gate_up_proj = ExpertsGateUp(shard, dtype=dtype)
        self.down_proj = ExpertsDown(shard, dtype=dtype)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(T, hidden size), (T, k), (T, k) -> (T, hidden size), this rank's share of the sum."""
        return mix_experts(hidden, ids, weights, self.gate_up_proj.weight, self.down_proj.weight, first=self.first)


class SparseMlp(CommunicatingModule):
    """Each token's experts, weighted and added, and the shared expert where there is one: one all-reduce."""

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__(communicator)
        self.gate = Router(experts, hidden_size, dtype=dtype)
        self.experts = Experts(ExpertShard(experts, hidden_size, communicator), dtype=dtype)
        self.shared_expert: SwigluMlp | None = None
        if experts.shared_intermediate_size:
            self.shared_expert = SwigluMlp(hidden_size, experts.shared_intermediate_size, communicator, dtype=dtype)
            self.shared_expert_gate = ReplicatedLinear(hidden_size, 1, dtype=dtype)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(T, hidden size) -> the same, whole on every rank."""
        share = self.experts(hidden, *self.gate.route(hidden))
        if self.shared_expert is not None:
            share.addcmul_(self.shared_expert_gate(hidden).sigmoid(), self.shared_expert.share(hidden))
        return self.communicator.all_reduce(share)
