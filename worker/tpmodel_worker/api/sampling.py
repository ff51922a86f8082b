"""Checks a request's sampling parameters and fills in what it leaves open."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.api.errors import invalid, out_of_range
from tpmodel_worker.models.config import ModelConfig

MAX_N = 64
MAX_LOGPROBS = 20
# Exact sampling merges this many candidates of every rank.
MAX_TOP_K = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingLimits:
    """What a model allows and proposes."""

    max_model_len: int
    """Most tokens of one sequence, prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    temperature: float
    top_k: int
    """0: off."""
    top_p: float

    @classmethod
    def of(cls, config: ModelConfig, max_model_len: int) -> SamplingLimits:
        """Limits and defaults of a checkpoint; max_model_len 0: the checkpoint's own."""
        proposed = config.generation
        greedy = proposed.do_sample is False
        return cls(
            max_model_len=max_model_len or config.max_model_len,
            vocab_size=config.vocab_size,
            eos_token_ids=config.eos_token_ids,
            temperature=0.0 if greedy else 1.0 if proposed.temperature is None else proposed.temperature,
            top_k=min(proposed.top_k or 0, MAX_TOP_K),
            top_p=1.0 if proposed.top_p is None else proposed.top_p,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedSampling:
    """Sampling parameters without anything left open."""

    slot: worker_pb2.SlotSampling
    n: int
    stop: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool


def resolve_sampling(
    params: inference_pb2.SamplingParams, limits: SamplingLimits, *, prompt_tokens: int, sample_index: int = 0
) -> ResolvedSampling:
    """Checks every field of params.

    Args:
        params: as the client sent them.
        limits: the model's.
        prompt_tokens: length of the prompt, already known to leave room for at least one token.
        sample_index: of the first sample.

    Raises:
        ApiError: INVALID_ARGUMENT naming field, value and accepted range.
    """
    room = limits.max_model_len - prompt_tokens
    max_tokens = _max_tokens(params, room)
    slot = worker_pb2.SlotSampling(
        temperature=_number(params, "temperature", limits.temperature, 0, math.inf, "[0, inf)"),
        top_k=_top_k(params, limits),
        top_p=_number(params, "top_p", limits.top_p, math.nextafter(0, 1), 1, "(0, 1]"),
        min_p=_number(params, "min_p", 0, 0, 1, "[0, 1]"),
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        sample_index=sample_index,
        repetition_penalty=_number(params, "repetition_penalty", 1, math.nextafter(0, 1), math.inf, "(0, inf)"),
        presence_penalty=_number(params, "presence_penalty", 0, -2, 2, "[-2, 2]"),
        frequency_penalty=_number(params, "frequency_penalty", 0, -2, 2, "[-2, 2]"),
        max_tokens=max_tokens,
        min_tokens=_integer(params, "min_tokens", 0, 0, max_tokens),
        stop_token_ids=_stop_token_ids(params, limits),
        logprobs=_integer(params, "logprobs", -1, 0, MAX_LOGPROBS),
    )
    return ResolvedSampling(
        slot=slot,
        n=_integer(params, "n", 1, 1, MAX_N),
        stop=_stop_strings(params.stop),
        include_stop=params.include_stop,
        skip_special_tokens=not params.HasField("skip_special_tokens") or params.skip_special_tokens,
    )


def check_token_ids(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raises INVALID_ARGUMENT for an id outside the vocabulary."""
    if token_ids and max(token_ids) >= vocab_size:
        position = next(index for index, token_id in enumerate(token_ids) if token_id >= vocab_size)
        raise out_of_range(f"{field}[{position}]", token_ids[position], f"[0, {vocab_size - 1}]")


def _number(
    params: inference_pb2.SamplingParams, field: str, default: float, lowest: float, highest: float, accepted: str
) -> float:
    if not params.HasField(field):  # pyright: ignore[reportArgumentType] - callers pass names of fields
        return default
    value: float = getattr(params, field)
    # Also refuses NaN, which compares as false.
    if not (lowest <= value <= highest and math.isfinite(value)):
        raise out_of_range(field, value, accepted)
    return value


def _integer(params: inference_pb2.SamplingParams, field: str, default: int, lowest: int, highest: int) -> int:
    if not params.HasField(field):  # pyright: ignore[reportArgumentType] - callers pass names of fields
        return default
    value: int = getattr(params, field)
    if not lowest <= value <= highest:
        raise out_of_range(field, value, f"[{lowest}, {highest}]")
    return value


def _max_tokens(params: inference_pb2.SamplingParams, room: int) -> int:
    if not params.HasField("max_tokens"):
        return room
    if params.max_tokens < 1:
        raise out_of_range("max_tokens", params.max_tokens, "at least 1")
    return min(params.max_tokens, room)


def _top_k(params: inference_pb2.SamplingParams, limits: SamplingLimits) -> int:
    value = params.top_k if params.HasField("top_k") else limits.top_k
    if value >= limits.vocab_size or value in (-1, 0):
        return 0
    if not 1 <= value <= MAX_TOP_K:
        raise out_of_range("top_k", value, f"[1, {MAX_TOP_K}], or 0 or -1 for off")
    return value


def _stop_strings(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOP_STRINGS:
        raise invalid("stop", f"{len(stops)} stop strings, accepted: at most {MAX_STOP_STRINGS}")
    for index, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise invalid(f"stop[{index}]", f"{len(stop)} characters, accepted: 1 to {MAX_STOP_CHARACTERS}")
    return tuple(dict.fromkeys(stops))


def _stop_token_ids(params: inference_pb2.SamplingParams, limits: SamplingLimits) -> list[int]:
    own = params.stop_token_ids
    if len(own) > MAX_STOP_TOKEN_IDS:
        raise invalid("stop_token_ids", f"{len(own)} ids, accepted: at most {MAX_STOP_TOKEN_IDS}")
    check_token_ids("stop_token_ids", own, limits.vocab_size)
    return sorted({*own, *(() if params.ignore_eos else limits.eos_token_ids)})
