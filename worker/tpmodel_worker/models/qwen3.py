"""Qwen3, dense: grouped-query attention with normalised queries and keys, SwiGLU, RMSNorm before each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.attention import PagedAttention, prepare_attention
from tpmodel_worker.kernels.fusion import HeadNorms, prepare_heads
from tpmodel_worker.models.batch import ForwardBatch, LayerCache, LayerKvCache
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config_types import ModelConfig
from tpmodel_worker.models.feed_forward import SwigluMlp
from tpmodel_worker.models.layers import (
    ParallelLanguageModelHead,
    QkvParallelLinear,
    RmsNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from tpmodel_worker.models.rotary import RotaryEmbedding
from tpmodel_worker.models.sharding import HeadShard, VocabShard


class Qwen3Attention(nn.Module):
    """Attention over the paged cache: this rank's heads, then one all-reduce in o_proj."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads = HeadShard.of_rank(heads, kv_heads, communicator.rank, communicator.world_size)
        self.scale = head_dim**-0.5
        self.qkv_proj = QkvParallelLinear(
            config.hidden_size, self.heads, total_heads=heads, total_kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
        )
        self.q_norm = RmsNorm(head_dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = RmsNorm(head_dim, config.rms_norm_eps, dtype=dtype)
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, communicator, dtype=dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: LayerKvCache,
        attention: PagedAttention,
    ) -> torch.Tensor:
        """(T, hidden size) -> the same; writes this step's keys and values into the cache."""
        norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, zero_centred=False)
        projected, counts = self.qkv_proj(hidden), self.qkv_proj.counts
        heads = prepare_heads(projected, counts, norms, rotation, cache, attention.kv_rows, gated=False)
        output = attention.attend(heads.query, heads.key, heads.value, cache, self.scale)
        return self.o_proj(output.flatten(1))


class Qwen3DecoderLayer(nn.Module):
    """Attention and feed-forward, each normalised before and added to the residual stream."""

    def __init__(self, config: ModelConfig, mlp: nn.Module, communicator: Communicator, dtype: torch.dtype) -> None:
        """mlp: the feed-forward layer, (T, hidden size) -> the same."""
        super().__init__()
        self.input_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Qwen3Attention(config, communicator, dtype)
        self.post_attention_layernorm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = mlp

    def forward(
        self,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: LayerKvCache,
        attention: PagedAttention,
    ) -> torch.Tensor:
        """Adds the last layer's update to the residual stream (T, hidden size), in place -> this layer's update."""
        update = self.self_attn(self.input_layernorm(hidden, update), rotation, cache, attention)
        return self.mlp(self.post_attention_layernorm(hidden, update))


class Qwen3Model(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(
        self, config: ModelConfig, mlps: Sequence[nn.Module], communicator: Communicator, dtype: torch.dtype
    ) -> None:
        """mlps: the feed-forward layer of each layer."""
        super().__init__()
        shard = VocabShard.of_rank(config.vocab_size, communicator.rank, communicator.world_size)
        self.dtype = dtype
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, shard, communicator, dtype=dtype
        )
        self.layers = nn.ModuleList(Qwen3DecoderLayer(config, mlp, communicator, dtype) for mlp in mlps)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerKvCache]) -> torch.Tensor:
        """The final hidden states of the batch's sample rows: (R, hidden size)."""
        attention = prepare_attention(batch, caches[0])
        rotation = self.rotary(batch.positions, self.dtype)
        hidden = self.embed_tokens(batch.token_ids)
        update: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            update = layer(hidden, update, rotation, cache, attention)
        return self.norm(hidden[batch.sample_rows], None if update is None else update[batch.sample_rows])


class Qwen3ForCausalLM(CausalLanguageModel):
    """One rank's shard of the model; module names follow the checkpoint's."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__(config, communicator)
        self.model = Qwen3Model(config, self.make_mlps(config, communicator, dtype), communicator, dtype)
        self.lm_head = ParallelLanguageModelHead(
            config.vocab_size,
            config.hidden_size,
            self.vocab,
            tied_to=self.model.embed_tokens.weight if config.tie_word_embeddings else None,
            dtype=dtype,
        )

    def make_mlps(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> list[nn.Module]:
        """The feed-forward layer of each layer."""
        hidden_size, features = config.hidden_size, config.intermediate_size
        return [SwigluMlp(hidden_size, features, communicator, dtype=dtype) for _ in range(config.num_hidden_layers)]

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """This rank's logits of the batch's sample rows: (R, vocab_shard) float32."""
        return self.lm_head(self.model(batch, caches))
