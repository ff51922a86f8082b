"""What config.json says alike of models with linear and full attention."""

from __future__ import annotations

from tpmodel_worker.models.config_parts import read_dtype, read_eos, read_head_dim
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import DtypeName, ExpertsConfig, LinearAttentionConfig, ModelConfig, RopeConfig
from tpmodel_worker.models.rope_config import read_rope

_LINEAR, _FULL = "linear_attention", "full_attention"
_PARTIAL_ROTARY = 0.25
_HEAD_DIM = 256
# Axes for the positions of pictures and films: those of text are the same number three times.
_AXES = ("mrope_section", "mrope_interleaved")


def read_hybrid(
    reader: ConfigReader,
    *,
    model_type: str,
    experts: ExpertsConfig | None,
    intermediate_size: int,
    tie_word_embeddings: bool,
    default_dtype: DtypeName | None = None,
) -> ModelConfig:
    """The decoder; generation defaults and the context limit are filled in by the caller.

    Args:
        reader: of the object that describes the decoder.
        model_type: of the whole file.
        experts: of the decoder.
        intermediate_size: of its dense layers; 0: there are none.
        tie_word_embeddings: as the file says.
        default_dtype: what the object around this one says; None: there is none, or it says nothing.
    """
    layers = reader.integer("num_hidden_layers")
    heads = reader.integer("num_attention_heads")
    max_position_embeddings = reader.integer("max_position_embeddings")
    vocab_size = reader.integer("vocab_size")
    head_dim = read_head_dim(reader, _HEAD_DIM)
    names_dtype = reader.has("dtype") or reader.has("torch_dtype") or default_dtype is None
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        tie_word_embeddings=tie_word_embeddings,
        rope=_read_rope(reader, head_dim, max_position_embeddings),
        max_position_embeddings=max_position_embeddings,
        max_model_len=max_position_embeddings,
        dtype=read_dtype(reader) if names_dtype or default_dtype is None else default_dtype,
        experts=experts,
        linear_attention=_read_linear_attention(reader, layers),
        eos_token_ids=read_eos(reader, vocab_size),
    )


def _read_rope(reader: ConfigReader, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    rope = read_rope(
        reader,
        default_theta=10000.0,
        max_position_embeddings=max_position_embeddings,
        default_partial=_PARTIAL_ROTARY,
        without_effect=_AXES,
    )
    rotated = int(head_dim * rope.partial_rotary_factor)
    if rotated == 0 or rotated % 2:
        what = f"{rotated} of {head_dim} dimensions: rotary embedding turns pairs of them"
        raise reader.error("partial_rotary_factor", rope.partial_rotary_factor, what)
    return rope


def _read_linear_attention(reader: ConfigReader, layers: int) -> LinearAttentionConfig:
    key_heads, value_heads = reader.integer("linear_num_key_heads"), reader.integer("linear_num_value_heads")
    if value_heads % key_heads:
        raise reader.error("linear_num_value_heads", value_heads, f"not a multiple of linear_num_key_heads {key_heads}")
    # The state's own dtype in published files; it is float32 here whatever the weights are.
    reader.require("mamba_ssm_dtype", "float32", because="the recurrent state is kept in float32")
    return LinearAttentionConfig(
        key_heads=key_heads,
        value_heads=value_heads,
        key_head_dim=reader.integer("linear_key_head_dim"),
        value_head_dim=reader.integer("linear_value_head_dim"),
        convolution=reader.integer("linear_conv_kernel_dim", 4, minimum=2),
        layers=_read_linear_layers(reader, layers),
    )


def _read_linear_layers(reader: ConfigReader, layers: int) -> tuple[int, ...]:
    """From layer_types where it is there, else all but every full_attention_interval-th layer."""
    interval = reader.integer("full_attention_interval", 4)
    types = reader.raw("layer_types")
    if types is None:
        types = [_LINEAR if (layer + 1) % interval else _FULL for layer in range(layers)]
    known = isinstance(types, list) and len(types) == layers and set(types) <= {_LINEAR, _FULL}
    if not known:
        raise reader.error("layer_types", types, f"expected {layers} times {_LINEAR} or {_FULL}")
    if _FULL not in types or _LINEAR not in types:
        raise reader.error("layer_types", types, f"expected both {_LINEAR} and {_FULL}")
    return tuple(layer for layer, kind in enumerate(types) if kind == _LINEAR)
