"""What config.json says alike in all supported architectures."""

from __future__ import annotations

from collections.abc import Iterable

from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import DtypeName, ExpertsConfig

DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")

# Training, bookkeeping, and what other tasks or other front ends read.
WITHOUT_EFFECT = (
    "_name_or_path",
    "attention_dropout",  # drops in training only
    "bos_token_id",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
)


def read_decoder(reader: ConfigReader, *, architecture: str) -> None:
    """Refuses what no architecture here computes, and passes over what changes nothing."""
    reader.require("architectures", [architecture], because="other heads are not served")
    read_layers(reader)


def read_layers(reader: ConfigReader) -> None:
    """read_decoder without the architecture's name, for each of the objects that describe a model in parts."""
    reader.require("attention_bias", False, because="projections have no bias here")
    reader.require("chunk_size_feed_forward", 0, because="feed-forward layers are not chunked")
    reader.require("hidden_act", "silu", because="the feed-forward layers compute SiLU")
    reader.require("is_encoder_decoder", False, because="this is a decoder")
    reader.require("use_sliding_window", False, because="attention sees the whole context")
    # Both act only together with use_sliding_window.
    reader.without_effect(("sliding_window", "max_window_layers"))
    reader.without_effect(WITHOUT_EFFECT)


def read_head_dim(reader: ConfigReader, default: int) -> int:
    """Features of one attention head; default: what a file without the key means."""
    head_dim = reader.integer("head_dim", default)
    if head_dim % 2:
        raise reader.error("head_dim", head_dim, "must be even: rotary embedding turns pairs of dimensions")
    return head_dim


def read_dtype(reader: ConfigReader) -> DtypeName:
    """The dtype that the weights are stored in, in the older and the newer spelling."""
    newer, older = reader.raw("dtype"), reader.raw("torch_dtype")
    if newer is not None and older is not None and newer != older:
        raise reader.error("torch_dtype", older, f"contradicts dtype = {newer!r}")
    name = newer if newer is not None else older if older is not None else "float32"
    for dtype in DTYPES:
        if name == dtype:
            return dtype
    raise reader.error("dtype", name, f"not supported; supported: {', '.join(DTYPES)}")


def read_eos(reader: ConfigReader, vocab_size: int) -> tuple[int, ...]:
    """The end-of-sequence ids: none, one or several."""
    value = reader.raw("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab_size:
            raise reader.error("eos_token_id", value, f"expected ids from 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def read_experts(reader: ConfigReader, *, layers: Iterable[int], normalise_weights: bool) -> ExpertsConfig:
    """The mixture of experts of the given layers."""
    reader.without_effect(("output_router_logits", "router_aux_loss_coef"))  # a loss of training
    newer, older = reader.raw("num_local_experts"), reader.raw("num_experts")
    if newer is not None and older is not None and newer != older:
        raise reader.error("num_local_experts", newer, f"contradicts num_experts = {older!r}")
    count = reader.integer("num_local_experts" if newer is not None else "num_experts")
    per_token = reader.integer("num_experts_per_tok")
    if per_token > count:
        raise reader.error("num_experts_per_tok", per_token, f"there are only {count} experts")
    return ExpertsConfig(
        count=count,
        per_token=per_token,
        intermediate_size=reader.integer("moe_intermediate_size"),
        normalise_weights=normalise_weights,
        layers=tuple(layers),
    )


def read_sparse_layers(reader: ConfigReader, layers: int) -> list[int]:
    """The layers with experts: every decoder_sparse_step-th, but for mlp_only_layers."""
    step = reader.integer("decoder_sparse_step", 1)
    dense = reader.raw("mlp_only_layers") or []
    known = range(layers)
    if not isinstance(dense, list) or not all(type(layer) is int and layer in known for layer in dense):
        raise reader.error("mlp_only_layers", dense, f"expected a list of layers from 0 to {layers - 1}")
    return [layer for layer in known if layer not in dense and (layer + 1) % step == 0]
