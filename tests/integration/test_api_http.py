"""A real api process over HTTP, mostly through the stock openai client, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio

from support.api_process import ApiUnderTest, api_under_test
from support.scripted_engine import Exchange, replies
from support.text_checkpoint import END
from tpmodel.v1 import inference_pb2, pod_pb2, worker_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "Schöne Grüße 你好 🙂 the quick brown fox"
MODEL = "test-model"
SECONDS = 10.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def running() -> AsyncIterator[ApiUnderTest]:
    async with api_under_test(replies([])) as process:
        yield process


@pytest_asyncio.fixture(loop_scope="module")
async def api(running: ApiUnderTest) -> ApiUnderTest:
    running.engine.script = replies(encode(running, TEXT))
    return running


@pytest_asyncio.fixture(loop_scope="module")
async def client(api: ApiUnderTest) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{api.http}/v1", api_key="none", max_retries=0, timeout=SECONDS) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def http(api: ApiUnderTest) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=api.http, timeout=SECONDS) as opened:
        yield opened


def encode(api: ApiUnderTest, text: str) -> list[int]:
    return api.tokenizer.encode(text).ids


def user(content: Any = "hi") -> list[Any]:
    return [{"role": "user", "content": content}]


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id for model in (await client.models.list()).data] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")


async def test_completion(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hello", max_tokens=50, temperature=0)
    assert reply.object == "text_completion"
    assert (reply.choices[0].text, reply.choices[0].finish_reason, reply.choices[0].logprobs) == (TEXT, "length", None)
    assert reply.usage is not None
    size = (len(encode(api, "hello")), len(encode(api, TEXT)))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == size
    assert reply.usage.total_tokens == sum(size)
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == 2
    assert (api.engine.submits[-1].sampling.temperature, api.engine.submits[-1].sampling.max_tokens) == (0, 50)


@pytest.mark.parametrize("form", ["texts", "ids"])
async def test_several_prompts_with_several_samples_keep_their_order(
    api: ApiUnderTest, client: openai.AsyncOpenAI, form: str
) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.admit()
        for index in range(exchange.submit.n):
            ids = [*exchange.submit.prompt_token_ids, *encode(api, f" {index}")]
            await exchange.tokens(ids, sample_index=index, finish=inference_pb2.FINISH_REASON_LENGTH)

    api.engine.script = echo
    texts = ["the", "quick", "fox"]
    prompt: Any = texts if form == "texts" else [encode(api, text) for text in texts]
    reply = await client.completions.create(model=MODEL, prompt=prompt, n=2)
    expected = [f"{text} {index}" for text in texts for index in range(2)]
    assert [choice.text for choice in reply.choices] == expected
    assert [choice.index for choice in reply.choices] == list(range(6))
    streamed = [""] * 6
    async for chunk in await client.completions.create(model=MODEL, prompt=prompt, n=2, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == expected


async def test_a_failure_says_when_to_try_again(api: ApiUnderTest, http: httpx.AsyncClient) -> None:
    async def too_late(exchange: Exchange) -> None:
        await exchange.fail(14, "the gang is rebuilding its world", retry_after_ms=2500)

    api.engine.script = too_late
    reply = await http.post("/v1/completions", json={"model": MODEL, "prompt": "hello"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "3")


async def test_ids_as_prompt_go_through_unchanged(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    await client.completions.create(model=MODEL, prompt=[5, 6, 7])
    assert list(api.engine.submits[-1].prompt_token_ids) == [5, 6, 7]


async def test_completion_logprobs(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hello", logprobs=2)
    logprobs: Any = reply.choices[0].logprobs
    assert logprobs.tokens == [api.tokenizer.decode([token_id]) for token_id in encode(api, TEXT)]
    assert logprobs.token_logprobs == [-0.5] * len(logprobs.tokens)
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert set(logprobs.top_logprobs[0]) == {"<|start|>", END, logprobs.tokens[0]}


async def test_chat_completion(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    parts: Any = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reply = await client.chat.completions.create(model=MODEL, messages=user(parts), max_completion_tokens=50)
    assert reply.object == "chat.completion"
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", TEXT)
    assert reply.choices[0].finish_reason == "length"
    submit = api.engine.submits[-1]
    sent = api.tokenizer.decode(list(submit.prompt_token_ids), skip_special_tokens=False)
    assert sent == f"<|start|>user\na\nb{END}\n<|start|>assistant\n"
    assert submit.sampling.max_tokens == 50


async def test_an_end_of_sequence_is_a_stop_without_text(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    api.engine.script = replies(encode(api, f"hi{END}"), finish=inference_pb2.FINISH_REASON_STOP)
    reply = await client.chat.completions.create(model=MODEL, messages=user())
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("hi", "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == len(encode(api, f"hi{END}"))


async def test_chat_stream(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL, messages=user(), stream=True, stream_options={"include_usage": True}, n=2
    )
    chunks = [chunk async for chunk in stream]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(2):
        own = [choice for choice in choices if choice.index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in own) == TEXT
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * len(encode(api, TEXT))


async def test_chat_logprobs_carry_bytes(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(model=MODEL, messages=user(), logprobs=True, top_logprobs=2)
    assert whole.choices[0].logprobs is not None
    content = whole.choices[0].logprobs.content
    assert content is not None
    assert bytes(byte for entry in content for byte in entry.bytes or []).decode() == TEXT
    assert [top.token for top in content[0].top_logprobs] == ["<|start|>", END]
    streamed: list[str] = []
    async for chunk in await client.chat.completions.create(model=MODEL, messages=user(), logprobs=True, stream=True):
        logprobs = chunk.choices[0].logprobs
        streamed += [entry.token for entry in (logprobs.content or [])] if logprobs else []
    assert streamed == [entry.token for entry in content]


async def test_stop_strings(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    reply = await client.completions.create(model=MODEL, prompt="hello", stop=["ick br", "zzz"])
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (TEXT[: TEXT.index("ick br")], "stop")
    kept = await client.completions.create(
        model=MODEL, prompt="hello", stop="ick br", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text.endswith("quick br")


async def test_further_fields_reach_the_engine(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "min_tokens": 2, "ignore_eos": True}
    extra |= {"stop_token_ids": [9], "skip_special_tokens": False, "priority": 4}
    await client.completions.create(model=MODEL, prompt="hello", seed=-1, extra_body=extra)
    submit = api.engine.submits[-1]
    slot = submit.sampling
    assert (slot.top_k, slot.min_p, slot.repetition_penalty, slot.min_tokens) == (5, 0.1, 1.5, 2)
    assert (list(slot.stop_token_ids), slot.seed, submit.priority) == ([9], 2**64 - 1, 4)


async def test_raw_stream_is_server_sent_events_with_done(http: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "hello", "stream": True}
    async with http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "mine"}) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert reply.headers["x-request-id"] == "mine"
        events = (await reply.aread()).decode().split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {event["id"] for event in parsed} == {"cmpl-mine"}
    assert "usage" not in parsed[0]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": "hi", "echo": True}, "echo"),
        ("completions", {"prompt": "hi", "suffix": "x"}, "suffix"),
        ("completions", {"prompt": "hi", "foo": 1}, "foo"),
        ("completions", {"prompt": "hi", "temperature": -1}, "temperature"),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [600] * 5}, "token_ids[0]"),
        ("completions", {"prompt": [5] * 512}, "prompt"),
        ("chat/completions", {"messages": user(), "tools": [{"type": "function"}]}, "tools"),
        ("chat/completions", {"messages": user(), "response_format": {"type": "json_object"}}, "response_format"),
        ("chat/completions", {"messages": []}, "messages"),
        ("chat/completions", {"messages": user(), "logprobs": True, "top_logprobs": 21}, "logprobs"),
    ],
)
async def test_a_refusal_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], field: str
) -> None:
    reply = await http.post(f"/v1/{path}", json=body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["param"], error["type"]) == (field, "invalid_request_error")
    assert field in error["message"]


async def test_another_model_and_another_path_are_404(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/completions", json={"model": "other", "prompt": "hi"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (404, "model")
    assert (await http.get("/v1/other")).json()["error"]["message"] == "Not Found"
    assert (await http.get("/v1/completions")).status_code == 405


async def test_a_full_queue_is_429_also_for_a_stream(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    async def full(exchange: Exchange) -> None:
        await exchange.fail(8, "the queue is full")

    api.engine.script = full
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        await client.completions.create(model=MODEL, prompt="hello")
    with pytest.raises(openai.RateLimitError, match="the queue is full"):
        await client.completions.create(model=MODEL, prompt="hello", stream=True)


async def test_a_failure_in_mid_stream_is_the_last_event(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    async def fails(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens(encode(api, "fox"))
        await exchange.fail(14, "the world broke")

    api.engine.script = fails
    text: list[str] = []

    async def read() -> None:
        stream = await client.completions.create(model=MODEL, prompt="hello", stream=True)
        async for chunk in stream:
            text.extend(choice.text for choice in chunk.choices)

    with pytest.raises(openai.APIError, match="the world broke"):
        await read()
    assert "".join(text) == "fox"


async def test_one_failing_prompt_ends_the_others(api: ApiUnderTest, client: openai.AsyncOpenAI) -> None:
    async def second_fails(exchange: Exchange) -> None:
        if list(exchange.submit.prompt_token_ids) == [6]:
            await exchange.fail(8, "no more")
        else:
            await exchange.admit()

    api.engine.script = second_fails
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model=MODEL, prompt=[[5], [6]])
    (first,) = [submit for submit in api.engine.submits[-2:] if list(submit.prompt_token_ids) == [5]]
    await api.engine.wait_for_cancel(first.handle)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "there"]])
async def test_a_client_that_goes_away_is_cancelled_in_the_engine(
    api: ApiUnderTest, http: httpx.AsyncClient, stream: bool, prompt: Any
) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens(encode(api, "fox"))

    api.engine.script = silent
    before = len(api.engine.submits)
    count = 1 if isinstance(prompt, str) else len(prompt)

    async def read() -> None:
        async with http.stream("POST", "/v1/completions", json={"prompt": prompt, "stream": stream}) as reply:
            async for _ in reply.aiter_bytes():
                pass

    task = asyncio.create_task(read())
    while len(api.engine.submits) < before + count:
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.05)
    task.cancel()
    for submit in api.engine.submits[before:]:
        await api.engine.wait_for_cancel(submit.handle)


async def test_the_timeout_header_is_a_deadline(api: ApiUnderTest, http: httpx.AsyncClient) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.admit()

    api.engine.script = silent
    reply = await http.post("/v1/completions", json={"prompt": "hello"}, headers={"x-request-timeout": "0.2"})
    assert reply.status_code == 504
    assert api.engine.submits[-1].deadline > 0
    await api.engine.wait_for_cancel(api.engine.submits[-1].handle)
    bad = await http.post("/v1/completions", json={"prompt": "hello"}, headers={"x-request-timeout": "soon"})
    assert bad.status_code == 400


async def test_health_and_refusals_follow_the_engines_phase(api: ApiUnderTest, http: httpx.AsyncClient) -> None:
    """W22: work before the build."""
    assert (await http.get("/health")).status_code == 200
    await api.engine.set_phase(worker_pb2.PHASE_LOADING)
    try:
        await wait_for_health(http, 503)
        reply = await http.post("/v1/completions", json={"prompt": "hello"})
        assert (reply.status_code, reply.json()["error"]["type"]) == (503, "server_error")
        assert "world not built yet" in reply.json()["error"]["message"]
    finally:
        await api.engine.set_phase(worker_pb2.PHASE_SERVING)
        await wait_for_health(http, 200)


async def test_metrics_count_what_happened(api: ApiUnderTest, http: httpx.AsyncClient) -> None:
    async def value(name: str) -> float:
        lines = (await http.get("/metrics")).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    done, refused = (
        'tpmodel_requests_total{code="OK",protocol="http"}',
        'tpmodel_requests_total{code="INVALID_ARGUMENT"',
    )
    names = [done, refused, "tpmodel_time_to_first_token_seconds_count", "tpmodel_request_queue_seconds_count"]
    names += ["tpmodel_request_seconds_count", "tpmodel_inter_token_seconds_count"]
    before = [await value(name) for name in names]
    await http.post("/v1/completions", json={"prompt": "hello"})
    await http.post("/v1/completions", json={"prompt": "hello", "n": 0})
    after = [await value(name) for name in names]
    tokens = len(encode(api, TEXT))
    assert [new - old for old, new in zip(before, after, strict=True)] == [1, 1, 1, 1, 2, tokens - 1]


async def test_a_body_of_outputs_without_tokens_is_no_event(api: ApiUnderTest, http: httpx.AsyncClient) -> None:
    async def with_empty_outputs(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.send(pod_pb2.Output())
        await exchange.tokens(encode(api, "fox"), finish=inference_pb2.FINISH_REASON_LENGTH)

    api.engine.script = with_empty_outputs
    reply = await http.post("/v1/completions", json={"prompt": "hello", "stream": True})
    assert reply.text.count("data: ") == 3


async def wait_for_health(http: httpx.AsyncClient, status: int) -> None:
    async with asyncio.timeout(SECONDS):
        while (await http.get("/health")).status_code != status:
            await asyncio.sleep(0.01)
