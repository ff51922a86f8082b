"""Rotary embedding settings out of config.json, in the older and the newer spelling."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import get_args

from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import ConfigError, RopeConfig, RopeType

ROPE_TYPES: tuple[RopeType, ...] = get_args(RopeType)


def read_rope(
    reader: ConfigReader,
    *,
    default_theta: float,
    max_position_embeddings: int,
    default_partial: float | None = None,
    without_effect: Iterable[str] = (),
) -> RopeConfig:
    """Reads `rope_theta` with `rope_scaling` (transformers 4) or `rope_parameters` (transformers 5).

    Args:
        reader: of the decoder's config.
        default_theta: where the file says nothing.
        max_position_embeddings: of the decoder.
        default_partial: part of the dimensions that is rotated where the file says nothing; None: always all.
        without_effect: keys of the rotary settings to pass over.

    Raises:
        ConfigError: a type or key that the rotary embedding does not compute, or two spellings at odds.
    """
    scaling, parameters = reader.raw("rope_scaling"), reader.raw("rope_parameters")
    if scaling is not None and parameters is not None and scaling != parameters:
        raise reader.error("rope_scaling", scaling, f"contradicts rope_parameters = {parameters!r}")
    key = "rope_scaling" if scaling is not None else "rope_parameters"
    values = scaling if scaling is not None else parameters if parameters is not None else {}
    if not isinstance(values, Mapping):
        raise reader.error(key, values, "expected an object")
    # Settings that stand beside the object in some files count as if they stood in it.
    merged = dict(values)
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        outer = reader.raw(name)
        if outer is not None and merged.setdefault(name, outer) != outer:
            raise reader.error(name, outer, f"contradicts {key}.{name} = {merged[name]!r}")
    inner = ConfigReader(merged, key)
    inner.without_effect(without_effect)
    partial = 1.0
    if default_partial is None:
        inner.require("partial_rotary_factor", 1.0, because="every dimension of a head is rotated")
    else:
        partial = inner.positive("partial_rotary_factor", default_partial)
        if partial > 1:
            raise inner.error("partial_rotary_factor", partial, "expected a number of at most 1")
    rope = _read_parameters(inner, default_theta=default_theta, max_position_embeddings=max_position_embeddings)
    return dataclasses.replace(rope, partial_rotary_factor=partial)


def _read_parameters(reader: ConfigReader, *, default_theta: float, max_position_embeddings: int) -> RopeConfig:
    rope_type = _read_type(reader)
    theta = reader.positive("rope_theta", default_theta)
    factor = 1.0 if rope_type == "default" else reader.positive("factor")
    rope = RopeConfig(rope_type=rope_type, theta=theta, factor=factor)
    if rope_type in ("yarn", "llama3"):
        original = reader.integer("original_max_position_embeddings", max_position_embeddings)
        if rope_type == "yarn":
            rope = _read_yarn(reader, theta, factor, original)
        else:
            low, high = reader.positive("low_freq_factor"), reader.positive("high_freq_factor")
            if high <= low:
                raise reader.error("high_freq_factor", high, f"must be above low_freq_factor = {low}")
            rope = RopeConfig(
                rope_type=rope_type,
                theta=theta,
                factor=factor,
                original_max_position_embeddings=original,
                low_freq_factor=low,
                high_freq_factor=high,
            )
    reader.finish()
    return rope


def _read_type(reader: ConfigReader) -> RopeType:
    older, newer = reader.raw("type"), reader.raw("rope_type")
    if older is not None and newer is not None and older != newer:
        raise reader.error("type", older, f"contradicts rope_type = {newer!r}")
    name = newer if newer is not None else older if older is not None else "default"
    for rope_type in ROPE_TYPES:
        if name == rope_type:
            return rope_type
    raise ConfigError(f"rope_type {name!r} is not supported; supported: {', '.join(ROPE_TYPES)}")


def _read_yarn(reader: ConfigReader, theta: float, factor: float, original: int) -> RopeConfig:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    # A zero weight means "not given" to the checkpoints that carry these two.
    mscale, mscale_all_dim = reader.number("mscale", 0.0), reader.number("mscale_all_dim", 0.0)
    attention_factor = magnitude(mscale) / magnitude(mscale_all_dim) if mscale and mscale_all_dim else magnitude(1.0)
    return RopeConfig(
        rope_type="yarn",
        theta=theta,
        factor=factor,
        original_max_position_embeddings=original,
        attention_factor=reader.positive("attention_factor", attention_factor),
        beta_fast=reader.positive("beta_fast", 32.0),
        beta_slow=reader.positive("beta_slow", 1.0),
        truncate=reader.flag("truncate", True),
    )
