"""Qwen3-Next: most layers with Gated DeltaNet, the others with gated full attention; most or all with experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.kernels.attention import PagedAttention, prepare_attention
from tpmodel_worker.kernels.fusion import HeadNorms, multiply_by_sigmoid, prepare_heads
from tpmodel_worker.kernels.gated_delta import GatedDelta, prepare_gated_delta
from tpmodel_worker.models.batch import ForwardBatch, LayerCache, LayerKvCache, LayerState
from tpmodel_worker.models.causal_lm import CausalLanguageModel
from tpmodel_worker.models.config_types import LinearAttentionConfig, ModelConfig
from tpmodel_worker.models.experts import SparseMlp
from tpmodel_worker.models.feed_forward import SwigluMlp
from tpmodel_worker.models.gated_delta_net import DeltaHeads, GatedDeltaNet
from tpmodel_worker.models.layers import (
    ParallelLanguageModelHead,
    QkvParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    ZeroCentredRmsNorm,
)
from tpmodel_worker.models.rotary import RotaryEmbedding
from tpmodel_worker.models.sharding import HeadShard, VocabShard


class GatedAttention(nn.Module):
    """Attention over the paged cache whose output each head gates; this rank's heads, one all-reduce in o_proj."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__()
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.scale = head_dim**-0.5
        self.qkv_proj = QkvParallelLinear(
            config.hidden_size,
            HeadShard.of_rank(heads, kv_heads, communicator.rank, communicator.world_size),
            total_heads=heads,
            total_kv_heads=kv_heads,
            head_dim=head_dim,
            gated=True,
            dtype=dtype,
        )
        self.q_norm = ZeroCentredRmsNorm(head_dim, config.rms_norm_eps, dtype=dtype)
        self.k_norm = ZeroCentredRmsNorm(head_dim, config.rms_norm_eps, dtype=dtype)
        self.o_proj = RowParallelLinear(heads * head_dim, config.hidden_size, communicator, dtype=dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: LayerKvCache,
        attention: PagedAttention,
    ) -> torch.Tensor:
        """(T, hidden size) -> the same; writes this step's keys and values into the cache."""
        norms = HeadNorms(self.q_norm.weight, self.k_norm.weight, self.q_norm.eps, zero_centred=True)
        projected, counts = self.qkv_proj(hidden), self.qkv_proj.counts
        heads = prepare_heads(projected, counts, norms, rotation, cache, attention.kv_rows, gated=True)
        output = attention.attend(heads.query, heads.key, heads.value, cache, self.scale)
        assert heads.gate is not None, "queries are gated"
        return self.o_proj(multiply_by_sigmoid(output, heads.gate).flatten(1))


class HybridDecoderLayer(nn.Module):
    """Linear or full attention, then feed-forward, each normalised before and added to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer: int, communicator: Communicator, dtype: torch.dtype, *, interleaved: bool
    ) -> None:
        super().__init__()
        size, eps, experts = config.hidden_size, config.rms_norm_eps, config.experts
        linear_attention = linear_attention_of(config)
        self.input_layernorm = ZeroCentredRmsNorm(size, eps, dtype=dtype)
        self.linear_attn: GatedDeltaNet | None = None
        self.self_attn: GatedAttention | None = None
        if layer in linear_attention.layers:
            self.linear_attn = GatedDeltaNet(
                linear_attention, size, eps, communicator, interleaved=interleaved, dtype=dtype
            )
        else:
            self.self_attn = GatedAttention(config, communicator, dtype)
        self.post_attention_layernorm = ZeroCentredRmsNorm(size, eps, dtype=dtype)
        if experts is not None and layer in experts.layers:
            self.mlp: nn.Module = SparseMlp(experts, size, communicator, dtype=dtype)
        else:
            self.mlp = SwigluMlp(size, config.intermediate_size, communicator, dtype=dtype)

    def forward(
        self,
        hidden: torch.Tensor,
        update: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor],
        cache: LayerCache,
        attention: PagedAttention,
        delta: GatedDelta,
    ) -> torch.Tensor:
        """Adds the last layer's update to the residual stream (T, hidden size), in place -> this layer's update."""
        normalised = self.input_layernorm(hidden, update)
        if self.linear_attn is not None:
            update = self.linear_attn(normalised, cast("LayerState", cache), delta)
        elif self.self_attn is not None:
            update = self.self_attn(normalised, rotation, cast("LayerKvCache", cache), attention)
        return self.mlp(self.post_attention_layernorm(hidden, update))


class HybridModel(nn.Module):
    """Embedding, layers and final norm.

    interleaved: how the checkpoint stores the linear layers' projections, see DeltaProjection.
    """

    def __init__(
        self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype, *, interleaved: bool
    ) -> None:
        super().__init__()
        shard = VocabShard.of_rank(config.vocab_size, communicator.rank, communicator.world_size)
        linear_attention = linear_attention_of(config)
        self.dtype = dtype
        self.taps = linear_attention.convolution - 1
        self.full_attention = next(
            layer for layer in range(config.num_hidden_layers) if layer not in linear_attention.layers
        )
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, shard, communicator, dtype=dtype
        )
        self.layers = nn.ModuleList(
            HybridDecoderLayer(config, layer, communicator, dtype, interleaved=interleaved)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = ZeroCentredRmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """The final hidden states of the batch's sample rows: (R, hidden size)."""
        attention = prepare_attention(batch, cast("LayerKvCache", caches[self.full_attention]))
        delta = prepare_gated_delta(batch, self.taps)
        rotation = self.rotary(batch.positions, self.dtype)
        hidden = self.embed_tokens(batch.token_ids)
        update: torch.Tensor | None = None
        for layer, cache in zip(self.layers, caches, strict=True):
            update = layer(hidden, update, rotation, cache, attention, delta)
        return self.norm(hidden[batch.sample_rows], None if update is None else update[batch.sample_rows])


class HybridCausalLM(CausalLanguageModel):
    """What the hybrid architectures share: which layers keep a state, and the head."""

    unused_tensors = ("mtp.",)  # drafts tokens ahead, for speculative decoding

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__(config, communicator)
        linear_attention = linear_attention_of(config)
        self.state_shape = DeltaHeads(linear_attention, communicator).state_shape
        self.keeps_state = tuple(layer in linear_attention.layers for layer in range(config.num_hidden_layers))

    def make_head(self, decoder: HybridModel) -> ParallelLanguageModelHead:
        """The output projection; with tied embeddings their weight."""
        return ParallelLanguageModelHead(
            self.config.vocab_size,
            self.config.hidden_size,
            self.vocab,
            tied_to=decoder.embed_tokens.weight if self.config.tie_word_embeddings else None,
            dtype=decoder.dtype,
        )


class Qwen3NextForCausalLM(HybridCausalLM):
    """One rank's shard of the model; module names follow the checkpoint's."""

    def __init__(self, config: ModelConfig, communicator: Communicator, dtype: torch.dtype) -> None:
        super().__init__(config, communicator, dtype)
        self.model = HybridModel(config, communicator, dtype, interleaved=True)
        self.lm_head = self.make_head(self.model)

    def forward(self, batch: ForwardBatch, caches: Sequence[LayerCache]) -> torch.Tensor:
        """This rank's logits of the batch's sample rows: (R, vocab_shard) float32."""
        return self.lm_head(self.model(batch, caches))


def linear_attention_of(config: ModelConfig) -> LinearAttentionConfig:
    """The part of the config that every hybrid model has."""
    assert config.linear_attention is not None, "the config of this model_type has linear attention"
    return config.linear_attention
