"""What the rest of the system knows of a model before any weight is read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DtypeName = Literal["float32", "bfloat16", "float16"]
RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


class ConfigError(ValueError):
    """The checkpoint's configuration cannot be served as it is; the message names key, value and remedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, both spellings of the checkpoint format brought into one."""

    rope_type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    """By how much positions are stretched (linear, yarn, llama3). A `dynamic` factor acts beyond
    max_position_embeddings only, which is as long as a context gets here."""
    original_max_position_embeddings: int = 0
    """Context length before stretching (yarn, llama3)."""
    attention_factor: float = 1.0
    """What cos and sin are multiplied by (yarn)."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Whether yarn rounds the borders of its ramp to whole dimensions."""
    partial_rotary_factor: float = 1.0
    """Part of each head's dimensions that is rotated: its first ones."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """What generation_config.json proposes for requests that leave a field unset; None: nothing."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsConfig:
    """The mixture of experts that some or all layers have in place of one feed-forward layer."""

    count: int
    per_token: int
    """Experts that each token is computed by."""
    intermediate_size: int
    """Features of one expert."""
    normalise_weights: bool
    """Whether the weights of a token's experts are made to sum to 1."""
    layers: tuple[int, ...]
    """The layers that have experts; the others are dense."""
    shared_intermediate_size: int = 0
    """Features of the expert that computes every token; 0: there is none."""
    whole: bool = False
    """Whether a rank holds some experts whole (expert parallelism), instead of a part of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearAttentionConfig:
    """The Gated DeltaNet layers of a hybrid model."""

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    convolution: int
    """Tokens that the convolution sees, the newest included."""
    layers: tuple[int, ...]
    """The layers with linear attention; the others have full attention."""

    @property
    def key_features(self) -> int:
        """Features of all key heads, and of all query heads."""
        return self.key_heads * self.key_head_dim

    @property
    def value_features(self) -> int:
        """Features of all value heads."""
        return self.value_heads * self.value_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder's shape, as its checkpoint's config.json gives it and as this code will compute it."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    max_position_embeddings: int
    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    dtype: DtypeName
    experts: ExpertsConfig | None = None
    linear_attention: LinearAttentionConfig | None = None
    eos_token_ids: tuple[int, ...] = ()
    generation: GenerationDefaults = GenerationDefaults()

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has one feed-forward layer of intermediate_size features."""
        return self.experts is None or len(self.experts.layers) < self.num_hidden_layers

    def activations_per_token(self, world_size: int) -> int:
        """Elements that one token takes at most while a rank computes: residual stream and the widest layer."""
        widest = 4 * self.intermediate_size // world_size if self.has_dense_layers else 0
        if self.experts is not None:
            features = 4 * self.experts.intermediate_size // (1 if self.experts.whole else world_size)
            widest = max(widest, self.experts.per_token * (3 * self.hidden_size + features))
        if self.linear_attention is not None:
            linear = self.linear_attention
            # In float32: matrices of 64 tokens with each other, and some copies of keys and values.
            per_head = 2 * (4 * 64 + 6 * (linear.key_head_dim + linear.value_head_dim))
            widest = max(widest, linear.value_heads * per_head // world_size)
        return 8 * self.hidden_size + widest
