"""Every sampling field is checked by name, value and range; what is left open gets its default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.served_model import make_served_model
from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.sampling import ResolvedSampling, SamplingLimits, resolve_sampling

LIMITS = SamplingLimits(max_model_len=100, vocab_size=500, eos_token_ids=(1, 2), temperature=1.0, top_k=0, top_p=1.0)


def resolve(limits: SamplingLimits = LIMITS, *, prompt_tokens: int = 10, **fields: Any) -> ResolvedSampling:
    return resolve_sampling(inference_pb2.SamplingParams(**fields), limits, prompt_tokens=prompt_tokens)


def test_defaults_are_the_documented_ones() -> None:
    resolved = resolve()
    slot = resolved.slot
    assert (slot.temperature, slot.top_k, slot.top_p, slot.min_p) == (1, 0, 1, 0)
    assert (slot.repetition_penalty, slot.presence_penalty, slot.frequency_penalty) == (1, 0, 0)
    assert (slot.max_tokens, slot.min_tokens, slot.logprobs) == (90, 0, -1)
    assert list(slot.stop_token_ids) == [1, 2]
    assert (resolved.n, resolved.stop, resolved.include_stop, resolved.skip_special_tokens) == (1, (), False, True)


def test_a_seed_is_drawn_for_every_request_without_one() -> None:
    seeds = {resolve().slot.seed for _ in range(8)}
    assert len(seeds) == 8
    assert resolve(seed=7).slot.seed == 7


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -2),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("max_tokens", 0),
        ("min_tokens", 91),
        ("logprobs", 21),
        ("n", 0),
        ("n", 65),
    ],
)
def test_a_value_out_of_range_is_refused_by_name_value_and_range(field: str, value: Any) -> None:
    with pytest.raises(ApiError) as refusal:
        resolve_sampling(inference_pb2.SamplingParams(**{field: value}), LIMITS, prompt_tokens=10)
    assert refusal.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.value.field == field
    assert field in refusal.value.message
    assert repr(value) in refusal.value.message
    assert "accepted" in refusal.value.message


@pytest.mark.parametrize("value", [-1, 0, 500, 10_000])
def test_top_k_that_cuts_nothing_is_off(value: int) -> None:
    assert resolve(top_k=value).slot.top_k == 0


def test_top_k_beyond_what_ranks_merge_is_refused() -> None:
    large = SamplingLimits(max_model_len=100, vocab_size=5000, eos_token_ids=(), temperature=1, top_k=0, top_p=1)
    assert resolve(large, top_k=1024).slot.top_k == 1024
    with pytest.raises(ApiError, match="top_k: 1025"):
        resolve(large, top_k=1025)


def test_max_tokens_ends_with_the_context() -> None:
    assert resolve(max_tokens=1000, prompt_tokens=60).slot.max_tokens == 40


def test_stop_ids_join_those_of_the_model_unless_those_are_ignored() -> None:
    assert list(resolve(stop_token_ids=[9, 2, 9]).slot.stop_token_ids) == [1, 2, 9]
    assert list(resolve(stop_token_ids=[9], ignore_eos=True).slot.stop_token_ids) == [9]


def test_a_stop_id_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ApiError, match=r"stop_token_ids\[1\]: 500 is out of range, accepted: \[0, 499\]"):
        resolve(stop_token_ids=[4, 500])


@pytest.mark.parametrize("stops", [[""], ["x" * 257], ["a"] * 17])
def test_stop_strings_are_limited_in_number_and_length(stops: list[str]) -> None:
    with pytest.raises(ApiError, match="stop"):
        resolve(stop=stops)


def test_logprobs_zero_means_the_chosen_token_only() -> None:
    assert resolve(logprobs=0).slot.logprobs == 0


def test_generation_config_gives_the_defaults(tmp_path: Path) -> None:
    proposed = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": True, "eos_token_id": [3, 4]}
    slot = resolve(make_served_model(tmp_path, generation_config=proposed).limits).slot
    assert (slot.temperature, slot.top_k, slot.top_p, list(slot.stop_token_ids)) == (0.6, 20, 0.95, [3, 4])
    assert resolve(make_served_model(tmp_path, generation_config=proposed).limits, top_k=0).slot.top_k == 0


def test_a_checkpoint_that_says_do_sample_false_is_greedy(tmp_path: Path) -> None:
    limits = make_served_model(tmp_path, generation_config={"do_sample": False, "temperature": 0.6}).limits
    assert resolve(limits).slot.temperature == 0
    assert resolve(limits, temperature=0.5).slot.temperature == 0.5
