"""OpenAI bodies: what is not honoured is refused by name, never ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.openai_schema import (
    ChatCompletionBody,
    CompletionBody,
    parse_chat_completion,
    parse_completion,
)


def completion(**fields: Any) -> CompletionBody:
    return parse_completion(json.dumps({"model": "m", "prompt": "hi"} | fields).encode())


def chat(**fields: Any) -> ChatCompletionBody:
    messages = [{"role": "user", "content": "hi"}]
    return parse_chat_completion(json.dumps({"model": "m", "messages": messages} | fields).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_object"}),
        ("logit_bias", {"5": 1}),
        ("functions", [{}]),
        ("modalities", ["text", "audio"]),
        ("service_tier", "flex"),
    ],
)
def test_a_known_field_without_support_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ApiError, match=f"{field}: not supported") as refusal:
        chat(**{field: value})
    assert refusal.value.field == field


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": None},
        {"response_format": {"type": "text"}},
        {"logit_bias": {}},
        {"tool_choice": "auto"},
    ],
)
def test_a_value_that_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    chat(**fields)


@pytest.mark.parametrize(("field", "value"), [("echo", True), ("suffix", "end"), ("best_of", 3)])
def test_completion_fields_without_support_are_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ApiError, match=f"{field}: not supported"):
        completion(**{field: value})


def test_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(ApiError, match="temprature: unknown field"):
        completion(temprature=1)
    with pytest.raises(ApiError, match=r"messages\.0\.tool_calls: unknown field"):
        chat(messages=[{"role": "assistant", "content": "", "tool_calls": []}])


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"temperature": "1"}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"n": -1}, "n"),
        ({"stop": [1]}, "stop"),
        ({"prompt": {"text": "x"}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 2**32}, "max_tokens"),
    ],
)
def test_a_value_of_the_wrong_kind_names_its_field(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as refusal:
        completion(**fields)
    assert refusal.value.field == field


def test_a_body_that_is_no_json_is_refused() -> None:
    with pytest.raises(ApiError):
        parse_completion(b"{")


def test_an_image_part_is_refused() -> None:
    part = {"type": "image_url", "image_url": {"url": "x"}}
    with pytest.raises(ApiError, match="messages"):
        chat(messages=[{"role": "user", "content": [part]}])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([], []),
    ],
)
def test_prompts_in_all_four_forms(prompt: object, prompts: list[object]) -> None:
    assert completion(prompt=prompt).prompts() == prompts


def test_fields_become_those_of_the_grpc_request() -> None:
    body = completion(
        temperature=0.5,
        top_k=-1,
        seed=-1,
        stop="x",
        n=2,
        logprobs=3,
        max_tokens=4,
        ignore_eos=True,
        priority=-2,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        stop_token_ids=[5],
    )
    request = body.to_generate_request("id")
    sampling = request.sampling
    assert (request.request_id, request.priority) == ("id", -2)
    assert (sampling.temperature, sampling.top_k, sampling.seed, list(sampling.stop)) == (0.5, -1, 2**64 - 1, ["x"])
    assert (sampling.n, sampling.logprobs, sampling.max_tokens, sampling.ignore_eos) == (2, 3, 4, True)
    assert (sampling.include_stop, sampling.skip_special_tokens, list(sampling.stop_token_ids)) == (True, False, [5])
    assert not sampling.HasField("top_p")


def test_text_parts_are_joined_and_names_kept() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat(messages=[{"role": "user", "content": parts, "name": "Ann"}])
    assert body.messages[0].for_template() == {"role": "user", "content": "a\nb", "name": "Ann"}


def test_chat_spellings() -> None:
    request = chat(max_completion_tokens=5, logprobs=True, top_logprobs=2).to_generate_request("id")
    assert (request.sampling.max_tokens, request.sampling.logprobs) == (5, 2)
    assert chat(logprobs=True).to_generate_request("id").sampling.logprobs == 0
    assert not chat(logprobs=False).to_generate_request("id").sampling.HasField("logprobs")
    with pytest.raises(ApiError, match="top_logprobs"):
        chat(top_logprobs=2)
    with pytest.raises(ApiError, match="max_tokens"):
        chat(max_completion_tokens=5, max_tokens=5)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "body: Invalid JSON"),
        (b"[]", "body: Input should be an object"),
        (b'{"prompt": 5}', "prompt: expected a text, token ids"),
        (b'{"prompt": [1, -2]}', "prompt: expected a text, token ids"),
        (b'{"prompt": "x", "stop": 7}', "stop: expected a text or a list of texts"),
        (b'{"prompt": "x", "max_tokens": "y"}', "max_tokens: Input should be a valid integer"),
        (b"{}", "prompt: Field required"),
    ],
)
def test_a_body_that_cannot_be_read_is_explained_once(body: bytes, message: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse_completion(body)
    assert str(caught.value).startswith(message)
    assert ";" not in str(caught.value)
