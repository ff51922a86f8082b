"""From a checkpoint folder to a ModelConfig that this code honours in every key. No torch."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tpmodel_worker.models.config_parts import read_eos
from tpmodel_worker.models.config_reader import ConfigReader
from tpmodel_worker.models.config_types import ConfigError, GenerationDefaults, ModelConfig, RopeConfig
from tpmodel_worker.models.qwen3_5_config import (
    parse_qwen3_5,
    parse_qwen3_5_moe,
    parse_qwen3_5_moe_text,
    parse_qwen3_5_text,
)
from tpmodel_worker.models.qwen3_config import parse_qwen3
from tpmodel_worker.models.qwen3_moe_config import parse_qwen3_moe
from tpmodel_worker.models.qwen3_next_config import parse_qwen3_next

__all__ = [
    "ConfigError",
    "GenerationDefaults",
    "ModelConfig",
    "RopeConfig",
    "check_world_size",
    "longest_context",
    "parse_model_config",
    "read_model_config",
    "world_sizes_that_work",
]

_PARSERS: Mapping[str, Callable[[ConfigReader], ModelConfig]] = MappingProxyType(
    {
        "qwen3": parse_qwen3,
        "qwen3_5": parse_qwen3_5,
        "qwen3_5_moe": parse_qwen3_5_moe,
        "qwen3_5_moe_text": parse_qwen3_5_moe_text,
        "qwen3_5_text": parse_qwen3_5_text,
        "qwen3_moe": parse_qwen3_moe,
        "qwen3_next": parse_qwen3_next,
    }
)


def parse_model_config(
    config: Mapping[str, Any],
    *,
    world_size: int,
    max_model_len: int = 0,
    expert_parallel: bool = False,
    generation_config: Mapping[str, Any] | None = None,
) -> ModelConfig:
    """Checks a parsed config.json, and generation_config.json where there is one.

    Args:
        config: config.json.
        world_size: ranks that will share the model.
        max_model_len: longest sequence in tokens; 0: as long as the checkpoint allows.
        expert_parallel: whether ranks hold whole experts.
        generation_config: generation_config.json; its end-of-sequence ids replace those of config.json.

    Raises:
        ConfigError: naming the key, value or numbers that do not work.
    """
    reader = ConfigReader(config, "config.json")
    model_type = reader.raw("model_type")
    if not isinstance(model_type, str) or model_type not in _PARSERS:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported: {', '.join(sorted(_PARSERS))}")
    parsed = _PARSERS[model_type](reader)
    reader.finish()

    generation = ConfigReader(generation_config or {}, "generation_config.json")
    replaced = generation.has("eos_token_id")
    parsed = dataclasses.replace(
        parsed,
        eos_token_ids=read_eos(generation, parsed.vocab_size) if replaced else parsed.eos_token_ids,
        generation=_read_generation(generation),
        max_model_len=_resolve_max_model_len(parsed, max_model_len),
    )
    if expert_parallel:
        if parsed.experts is None:
            raise ConfigError(f"expert parallelism: model_type {model_type!r} has no experts; leave it off")
        parsed = dataclasses.replace(parsed, experts=dataclasses.replace(parsed.experts, whole=True))
    check_world_size(parsed, world_size)
    return parsed


def read_model_config(
    path: str | Path, *, world_size: int, max_model_len: int = 0, expert_parallel: bool = False
) -> ModelConfig:
    """Reads config.json and generation_config.json of a checkpoint folder. Raises as parse_model_config."""
    folder = Path(path)
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigError("config.json does not exist: this is no checkpoint folder")
    return parse_model_config(
        config,
        world_size=world_size,
        max_model_len=max_model_len,
        expert_parallel=expert_parallel,
        generation_config=_read_json(folder / "generation_config.json"),
    )


def longest_context(config: ModelConfig) -> int:
    """Most tokens of one sequence that the position embedding was made for."""
    if config.rope.rope_type == "yarn":
        stretched = int(config.rope.original_max_position_embeddings * config.rope.factor)
        return max(config.max_position_embeddings, stretched)
    return config.max_position_embeddings


def check_world_size(config: ModelConfig, world_size: int) -> None:
    """Raises ConfigError unless `world_size` ranks can share the model (P2)."""
    if world_size < 1:
        raise ConfigError(f"world size {world_size}: at least one rank is needed")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if heads % kv_heads:
        raise ConfigError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    problem = _sharding_problem(config, world_size)
    if problem is not None:
        works = ", ".join(str(size) for size in world_sizes_that_work(config))
        raise ConfigError(f"world size {world_size}: {problem}; sizes that work: {works}")


def world_sizes_that_work(config: ModelConfig) -> list[int]:
    """Every number of ranks that the model can be shared by."""
    return [size for size in range(1, config.num_attention_heads + 1) if _sharding_problem(config, size) is None]


def _sharding_problem(config: ModelConfig, world_size: int) -> str | None:
    for key, size in _divided_sizes(config):
        if size % world_size:
            return f"{key} {size} is not divisible by it"
    kv_heads = config.num_key_value_heads
    if kv_heads >= world_size and kv_heads % world_size:
        return f"num_key_value_heads {kv_heads} is not divisible by it"
    if kv_heads < world_size and world_size % kv_heads:
        return f"it is not a multiple of num_key_value_heads {kv_heads}"
    return None


def _divided_sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Keys of config.json and their values, of which every rank takes an equal part."""
    yield "num_attention_heads", config.num_attention_heads
    if config.has_dense_layers:
        yield "intermediate_size", config.intermediate_size
    if config.experts is not None:
        if config.experts.whole:
            yield "num_experts", config.experts.count
        else:
            yield "moe_intermediate_size", config.experts.intermediate_size
        yield "shared_expert_intermediate_size", config.experts.shared_intermediate_size
    if config.linear_attention is not None:
        yield "linear_num_key_heads", config.linear_attention.key_heads


def _resolve_max_model_len(config: ModelConfig, wanted: int) -> int:
    limit = longest_context(config)
    if wanted < 0:
        raise ConfigError(f"max_model_len {wanted}: expected a number of tokens, or 0 for all {limit}")
    if wanted > limit:
        raise ConfigError(f"max_model_len {wanted} is more than the {limit} positions of the checkpoint")
    return wanted or limit


def _read_generation(reader: ConfigReader) -> GenerationDefaults:
    # Other keys of this file steer the generation loop of other programs, not what the model computes.
    top_p = reader.positive("top_p") if reader.has("top_p") else None
    if top_p is not None and top_p > 1:
        raise reader.error("top_p", top_p, "expected a number of at most 1")
    temperature = reader.number("temperature") if reader.has("temperature") else None
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise reader.error("temperature", temperature, "expected a number of at least 0")
    return GenerationDefaults(
        do_sample=reader.flag("do_sample", False) if reader.has("do_sample") else None,
        temperature=temperature,
        top_k=reader.integer("top_k", minimum=-1) if reader.has("top_k") else None,
        top_p=top_p,
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path.name} can't be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path.name} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name}: expected a JSON object")
    return value
