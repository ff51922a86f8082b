"""What the rank knows of any model: its shard's shape, how to run it, how to give it a new world."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.models.batch import ForwardBatch, LayerCache, StateShape
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.layers import CommunicatingModule
from tpmodel_worker.models.sharding import HeadShard, VocabShard


class CausalLanguageModel(nn.Module, ABC):
    """One rank's shard of a decoder."""

    def __init__(self, config: ModelConfig, communicator: Communicator) -> None:
        super().__init__()
        rank, world_size = communicator.rank, communicator.world_size
        heads = HeadShard.of_rank(config.num_attention_heads, config.num_key_value_heads, rank, world_size)
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.vocab = VocabShard.of_rank(config.vocab_size, rank, world_size)
        self.vocab_start = self.vocab.start
        """Token id of this rank's first column of logits."""
        self.vocab_shard = self.vocab.size
        """Columns of logits of every rank, padding included."""
        self.kv_heads = heads.kv_heads
        """KV heads of this rank's cache."""
        self.head_dim = config.head_dim
        self.state_shape: StateShape | None = None
        """What each linear-attention layer keeps of a sequence; None without such layers."""
        self.keeps_state: tuple[bool, ...] = (False,) * config.num_hidden_layers
        """For each layer, whether it keeps a state of state_shape instead of keys and values."""

    unused_tensors: ClassVar[tuple[str, ...]] = ()
    """Beginnings of names of checkpoint tensors that other uses of a checkpoint need and this model does not."""

    @abstractmethod
    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """Computes the batch's tokens; writes their keys and values into the caches, and moves the states on.

        Args:
            batch: the tokens of one step.
            caches: one for each layer, of the kind that keeps_state says.

        Returns:
            (R, vocab_shard) float32: this rank's columns of the logits of batch.sample_rows. -inf in
            columns that stand for no token.
        """

    def bind(self, communicator: Communicator) -> None:
        """Continues with the communicator of a new epoch.

        Raises:
            ValueError: it is of another rank or world size than the shard.
        """
        if (communicator.rank, communicator.world_size) != (self.rank, self.world_size):
            raise ValueError(
                f"the shard is of rank {self.rank} of {self.world_size}, "
                f"the communicator of rank {communicator.rank} of {communicator.world_size}"
            )
        for module in self.modules():
            if isinstance(module, CommunicatingModule):
                module.communicator = communicator
