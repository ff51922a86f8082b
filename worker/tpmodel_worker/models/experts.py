"""Mixture of experts: a router that every rank computes, experts split over their intermediate features."""

from __future__ import annotations

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.experts import mix_experts
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
        probabilities = self(hidden).softmax(dim=-1, dtype=torch.float32)
        weights, ids = probabilities.topk(self.per_token, dim=-1)
        if self.normalise:
            weights /= weights.sum(dim=-1, keepdim=True)
        return ids, weights.to(hidden.dtype)


class ExpertsGateUp(ShardedModule):
    """The gate and up projections of all experts: (experts, 2 * features / world size, hidden size)."""

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.experts = experts.count
        self.features = experts.intermediate_size
        self.hidden_size = hidden_size
        self.share = divide(self.features, communicator.world_size)
        self.start = communicator.rank * self.share
        self.weight = empty_weight(self.experts, 2 * self.share, hidden_size, dtype=dtype)

    def parts(self, name: str) -> list[TensorPart]:
        """Of the tensor that stacks all experts, a range of gate rows and the same range of up rows."""
        shape = (self.experts, 2 * self.features, self.hidden_size)
        return [
            TensorPart(
                checkpoint_name=name,
                shape=shape,
                dimension=1,
                start=index * self.features + self.start,
                length=self.share,
                offset=index * self.share,
            )
            for index in range(2)
        ]

    def layouts(self, name: str) -> list[list[TensorPart]]:
        """All experts in one tensor, or two tensors for each expert."""
        single = [
            TensorPart(
                checkpoint_name=f"{expert}.{projection}.weight",
                shape=(self.features, self.hidden_size),
                dimension=0,
                start=self.start,
                length=self.share,
                offset=index * self.share,
                stack_index=expert,
            )
            for expert in range(self.experts)
            for index, projection in enumerate(("gate_proj", "up_proj"))
        ]
        return [self.parts(name), single]


class ExpertsDown(ShardedModule):
    """The down projections of all experts: (experts, hidden size, features / world size)."""

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.experts = experts.count
        self.features = experts.intermediate_size
        self.hidden_size = hidden_size
        self.share = divide(self.features, communicator.world_size)
        self.start = communicator.rank * self.share
        self.weight = empty_weight(self.experts, hidden_size, self.share, dtype=dtype)

    def parts(self, name: str) -> list[TensorPart]:
        """A range of columns of the tensor that stacks all experts."""
        shape = (self.experts, self.hidden_size, self.features)
        return [TensorPart(checkpoint_name=name, shape=shape, dimension=2, start=self.start, length=self.share)]

    def layouts(self, name: str) -> list[list[TensorPart]]:
        """All experts in one tensor, or one tensor for each expert."""
        single = [
            TensorPart(
                checkpoint_name=f"{expert}.{name}.weight",
                shape=(self.hidden_size, self.features),
                dimension=1,
                start=self.start,
                length=self.share,
                stack_index=expert,
            )
            for expert in range(self.experts)
        ]
        return [self.parts(name), single]


class Experts(nn.Module):
    """This rank's features of all experts."""

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate_up_proj = ExpertsGateUp(experts, hidden_size, communicator, dtype=dtype)
        self.down_proj = ExpertsDown(experts, hidden_size, communicator, dtype=dtype)

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(T, hidden size), (T, k), (T, k) -> (T, hidden size), this rank's share of the sum."""
        return mix_experts(hidden, ids, weights, self.gate_up_proj.weight, self.down_proj.weight)


class SparseMlp(CommunicatingModule):
    """Each token's experts, weighted and added, and the shared expert where there is one: one all-reduce."""

    def __init__(
        self, experts: ExpertsConfig, hidden_size: int, communicator: Communicator, *, dtype: torch.dtype
    ) -> None:
        super().__init__(communicator)
        self.gate = Router(experts, hidden_size, dtype=dtype)
        self.experts = Experts(experts, hidden_size, communicator, dtype=dtype)
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
