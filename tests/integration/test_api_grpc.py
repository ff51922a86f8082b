"""A real api process over gRPC, with a scripted engine behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from support.api_process import ApiUnderTest, api_under_test
from support.scripted_engine import Exchange, replies
from support.text_checkpoint import END
from tpmodel.errors import UnavailableError, error_from
from tpmodel.v1 import inference_pb2, inference_pb2_grpc, pod_pb2, worker_pb2

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXT = "Schöne Grüße 你好 🙂 the quick brown fox"
SECONDS = 10.0


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def api() -> AsyncIterator[ApiUnderTest]:
    async with api_under_test(replies([])) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def channel(api: ApiUnderTest) -> AsyncIterator[grpc.aio.Channel]:
    api.engine.script = replies(encode(api, TEXT))
    async with grpc.aio.insecure_channel(api.target) as opened:
        yield opened


@pytest_asyncio.fixture(loop_scope="module")
async def stub(channel: grpc.aio.Channel) -> inference_pb2_grpc.InferenceServiceAsyncStub:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def encode(api: ApiUnderTest, text: str) -> list[int]:
    return api.tokenizer.encode(text).ids


def prompt(**fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text="hello", **fields)


async def generate(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, request: inference_pb2.GenerateRequest, **call: Any
) -> tuple[list[inference_pb2.GenerateChunk], inference_pb2.GenerateCompletion]:
    """The chunks, the first of which is `started`, and the completion, which must be last."""
    responses = [response async for response in stub.Generate(request, timeout=SECONDS, **call)]
    assert [response.WhichOneof("response") for response in responses[:-1]] == ["chunk"] * (len(responses) - 1)
    return [response.chunk for response in responses[:-1]], responses[-1].completion


async def refusal(
    stub: inference_pb2_grpc.InferenceServiceAsyncStub, request: inference_pb2.GenerateRequest, **call: Any
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await generate(stub, request, **call)
    return error.value


def ids_and_text(chunks: list[inference_pb2.GenerateChunk], sample_index: int = 0) -> tuple[list[int], str]:
    own = [chunk for chunk in chunks if chunk.sample_index == sample_index]
    return [token_id for chunk in own for token_id in chunk.token_ids], "".join(chunk.text for chunk in own)


async def test_the_process_reports_to_the_supervisor(api: ApiUnderTest) -> None:
    assert (api.report.name, api.report.listening) == ("api 0", True)


async def test_a_stream_begins_with_started_and_ends_with_the_usage(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    request = prompt(request_id="mine", sampling=inference_pb2.SamplingParams(seed=11))
    chunks, completion = await generate(stub, request)
    started = chunks[0].started
    assert (started.request_id, started.seed, started.weight_version) == ("mine", 11, 3)
    assert started.prompt_tokens == len(encode(api, "hello"))
    assert not chunks[0].token_ids
    assert not any(chunk.HasField("started") for chunk in chunks[1:])
    ids = encode(api, TEXT)
    assert ids_and_text(chunks) == (ids, TEXT)
    (sample,) = completion.samples
    assert (sample.finish_reason, sample.completion_tokens) == (inference_pb2.FINISH_REASON_LENGTH, len(ids))
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (started.prompt_tokens, len(ids), 2)
    assert list(completion.weight_versions) == [3]


async def test_every_chunk_has_whole_tokens_with_their_text(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    async def slowly(exchange: Exchange) -> None:
        await exchange.admit()
        ids = encode(api, TEXT)
        for position, token_id in enumerate(ids):
            last = position == len(ids) - 1
            finish = inference_pb2.FINISH_REASON_LENGTH if last else inference_pb2.FINISH_REASON_UNSPECIFIED
            await exchange.tokens([token_id], finish=finish)
            await asyncio.sleep(0.005)

    api.engine.script = slowly
    chunks, _ = await generate(stub, prompt())
    assert len(chunks) > 3
    for chunk in chunks[1:]:
        assert chunk.text == api.tokenizer.decode(list(chunk.token_ids))
        assert "\ufffd" not in chunk.text


async def test_the_engine_gets_tokens_and_resolved_parameters(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    sampling = inference_pb2.SamplingParams(temperature=0.5, top_k=7, max_tokens=9, stop_token_ids=[5], min_p=0.1)
    await generate(stub, prompt(sampling=sampling, priority=-3))
    submit = api.engine.submits[-1]
    assert list(submit.prompt_token_ids) == encode(api, "hello")
    assert (submit.n, submit.priority) == (1, -3)
    slot = submit.sampling
    assert (slot.temperature, slot.top_k, slot.max_tokens, slot.min_p, slot.logprobs) == (0.5, 7, 9, 0.1, -1)
    assert set(slot.stop_token_ids) == {5, api.tokenizer.token_to_id(END)}
    assert slot.seed
    assert submit.deadline > 0


async def test_log_probabilities_and_samples(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    chunks, completion = await generate(stub, prompt(sampling=inference_pb2.SamplingParams(n=3, logprobs=2)))
    ids = encode(api, TEXT)
    for index in range(3):
        assert ids_and_text(chunks, index) == (ids, TEXT)
        entries = [entry for chunk in chunks if chunk.sample_index == index for entry in chunk.logprobs]
        assert [entry.text for entry in entries] == [api.tokenizer.decode([token_id]) for token_id in ids]
        assert all([top.token_id for top in entry.top] == [0, 1] for entry in entries)
    assert [sample.sample_index for sample in completion.samples] == [0, 1, 2]
    assert completion.usage.completion_tokens == 3 * len(ids)


async def test_a_stop_string_across_tokens_ends_the_stream_and_cancels_in_the_engine(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    async def endless(exchange: Exchange) -> None:
        await exchange.admit()
        for token_id in encode(api, "the quick brown fox " * 20):
            await exchange.tokens([token_id])
            await asyncio.sleep(0.002)

    api.engine.script = endless
    chunks, completion = await generate(stub, prompt(sampling=inference_pb2.SamplingParams(stop=["ck bro", "zzz"])))
    ids, text = ids_and_text(chunks)
    assert text == "the qui"
    assert "ck bro" in api.tokenizer.decode(ids)
    assert "ck bro" not in api.tokenizer.decode(ids[:-1])
    (sample,) = completion.samples
    assert (sample.finish_reason, sample.stop) == (inference_pb2.FINISH_REASON_STOP, "ck bro")
    assert sample.completion_tokens == len(ids)
    cancel = await api.engine.wait_for_cancel(api.engine.submits[-1].handle)
    assert not cancel.HasField("sample_index")


async def test_a_stop_string_of_one_sample_cancels_only_that_one(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    cancelled = asyncio.Event()

    async def two(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens(encode(api, "the quick STOP"), sample_index=1)
        await cancelled.wait()
        await exchange.tokens(encode(api, "the lazy dog"), sample_index=0, finish=inference_pb2.FINISH_REASON_LENGTH)

    api.engine.script = two
    before = len(api.engine.submits)
    running = asyncio.create_task(generate(stub, prompt(sampling=inference_pb2.SamplingParams(n=2, stop=["STOP"]))))
    async with asyncio.timeout(SECONDS):
        while len(api.engine.submits) == before:
            await asyncio.sleep(0.01)
    handle = api.engine.submits[-1].handle
    cancel = await api.engine.wait_for_cancel(handle)
    assert (cancel.HasField("sample_index"), cancel.sample_index) == (True, 1)
    cancelled.set()
    chunks, completion = await running
    assert [ids_and_text(chunks, index)[1] for index in (0, 1)] == ["the lazy dog", "the quick "]
    assert [sample.stop for sample in completion.samples] == ["", "STOP"]
    assert api.engine.cancels_of(handle) == [cancel]


async def test_256_streams_at_once_on_one_channel(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    everybody: list[Exchange] = []
    complete = asyncio.Event()

    async def join(exchange: Exchange) -> None:
        await exchange.admit()
        everybody.append(exchange)
        if len(everybody) == 256:
            complete.set()

    api.engine.script = join
    streams = [
        asyncio.create_task(generate(stub, prompt(sampling=inference_pb2.SamplingParams(stop=["fox"]))))
        for _ in range(256)
    ]
    await asyncio.wait_for(complete.wait(), SECONDS)
    # As the engine does it: every step is one message with a token for each stream.
    ids = encode(api, f"{TEXT} never sent")
    for token_id in ids:
        outputs = [pod_pb2.Output(handle=exchange.submit.handle, token_ids=[token_id]) for exchange in everybody]
        await api.engine.send(pod_pb2.FrontResponse(outputs=pod_pb2.OutputBatch(outputs=outputs)))
    for chunks, completion in await asyncio.gather(*streams):
        assert ids_and_text(chunks) == (encode(api, TEXT), TEXT.removesuffix("fox"))
        assert completion.usage.completion_tokens == len(encode(api, TEXT))


async def test_a_client_that_goes_away_is_cancelled_in_the_engine(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    async def one_token_and_no_more(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens(encode(api, "fox"))

    api.engine.script = one_token_and_no_more
    call = stub.Generate(prompt())
    async for response in call:
        if response.chunk.token_ids:
            call.cancel()
            break
    await api.engine.wait_for_cancel(api.engine.submits[-1].handle)


async def test_a_deadline_ends_the_request_and_reaches_the_engine(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.admit()

    api.engine.script = silent
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in stub.Generate(prompt(), timeout=0.3):
            pass
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    await api.engine.wait_for_cancel(api.engine.submits[-1].handle)


async def test_a_broken_stream_is_resumed_where_it_broke(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    ids = encode(api, TEXT)
    whole, _ = await generate(stub, prompt())
    started = whole[0].started
    resumed, completion = await generate(
        stub,
        prompt(
            sampling=inference_pb2.SamplingParams(seed=started.seed),
            resume_token_ids=ids[:2],
            weight_version=started.weight_version,
        ),
    )
    rest = api.tokenizer.decode(ids)[len(api.tokenizer.decode(ids[:2])) :]
    assert ids_and_text(resumed) == (ids[2:], rest)
    assert completion.samples[0].completion_tokens == len(ids)
    assert list(api.engine.submits[-1].resume_token_ids) == ids[:2]


async def test_a_stream_that_broke_before_its_completion_only_is_completed_at_once(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    submitted = len(api.engine.submits)
    ids = encode(api, "the quick")
    request = prompt(
        sampling=inference_pb2.SamplingParams(seed=1, max_tokens=len(ids)), resume_token_ids=ids, weight_version=3
    )
    chunks, completion = await generate(stub, request)
    assert ids_and_text(chunks) == ([], "")
    assert completion.samples[0].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    assert completion.usage.completion_tokens == len(ids)
    assert len(api.engine.submits) == submitted


async def test_other_weights_are_a_failed_precondition(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    request = prompt(sampling=inference_pb2.SamplingParams(seed=1), resume_token_ids=[5], weight_version=2)
    error = await refusal(stub, request)
    assert error.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "version 2" in (error.details() or "")


async def test_refusals_name_the_field(stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    error = await refusal(stub, prompt(sampling=inference_pb2.SamplingParams(top_p=1.5)))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "top_p: 1.5 is out of range, accepted: (0, 1]"
    unknown = inference_pb2.GenerateRequest.FromString(prompt().SerializeToString() + b"\xa0\x1f\x01")
    error = await refusal(stub, unknown)
    assert "field number 500" in (error.details() or "")


async def test_the_engines_refusal_keeps_its_code(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    async def full(exchange: Exchange) -> None:
        await exchange.fail(8, "1024 requests wait already")

    api.engine.script = full
    error = await refusal(stub, prompt())
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "1024 requests wait already")


async def test_a_failure_says_when_to_try_again(
    api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub
) -> None:
    """Of a request whose deadline passed while the world was being rebuilt."""

    async def too_late(exchange: Exchange) -> None:
        await exchange.fail(14, "the gang is rebuilding its world", retry_after_ms=2500)

    api.engine.script = too_late
    error = await refusal(stub, prompt())
    assert error.code() == grpc.StatusCode.UNAVAILABLE
    assert dict(error.trailing_metadata() or ())["retry-after-ms"] == "2500"
    typed = error_from(error)
    assert (type(typed), typed.retry_after) == (UnavailableError, 2.5)


async def test_ids_only(api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    chunks, _ = await generate(stub, prompt(detokenize=False))
    assert ids_and_text(chunks) == (encode(api, TEXT), "")


async def test_tokenize_and_detokenize(api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    tokens = await stub.Tokenize(inference_pb2.TokenizeRequest(text=TEXT))
    assert list(tokens.token_ids) == encode(api, TEXT)
    ids = [*tokens.token_ids, api.tokenizer.token_to_id(END)]
    whole = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids))
    skipped = await stub.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids, skip_special_tokens=True))
    assert (whole.text, skipped.text) == (TEXT + END, TEXT)
    chat = inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    rendered = await stub.Tokenize(inference_pb2.TokenizeRequest(chat=chat))
    assert api.tokenizer.decode(list(rendered.token_ids), skip_special_tokens=False).startswith("<|start|>user\nhi")


async def test_model_info_and_load(api: ApiUnderTest, stub: inference_pb2_grpc.InferenceServiceAsyncStub) -> None:
    info = await stub.GetModelInfo(inference_pb2.GetModelInfoRequest())
    assert (info.model_id, info.served_name, info.model_type) == ("test/model", "test-model", "qwen3")
    assert (info.max_model_len, info.dtype, info.weight_version, info.has_chat_template) == (512, "float32", 3, True)
    load = await stub.GetLoad(inference_pb2.GetLoadRequest())
    assert (load.running, load.waiting, load.queue_limit) == (1, 2, 1024)


async def test_health_follows_the_engines_phase_for_every_watcher(api: ApiUnderTest, channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    services = ["", "tpmodel.v1.InferenceService"]
    watches = [health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=SECONDS) for service in services]
    watches.append(health.Watch(health_pb2.HealthCheckRequest(service=""), timeout=SECONDS))
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert [(await watch.read()).status for watch in watches] == [serving] * 3
    # One that leaves must not take the others along.
    watches.pop().cancel()
    await api.engine.set_phase(worker_pb2.PHASE_REBUILDING)
    assert [(await watch.read()).status for watch in watches] == [not_serving] * 2
    await api.engine.set_phase(worker_pb2.PHASE_SERVING)
    assert [(await watch.read()).status for watch in watches] == [serving] * 2
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(channel: grpc.aio.Channel) -> None:
    untyped: Any = channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(untyped)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    response = await call.read()
    names = {service.name for service in response.list_services_response.service}
    assert {"tpmodel.v1.InferenceService", "grpc.health.v1.Health"} <= names


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (worker_pb2.PHASE_FORMING, "world not built yet"),
        (worker_pb2.PHASE_LOADING, "world not built yet"),
        (worker_pb2.PHASE_FAILED, "world not built yet"),
        (worker_pb2.PHASE_DRAINING, "draining"),
    ],
)
async def test_without_a_world_requests_are_unavailable(
    api: ApiUnderTest, channel: grpc.aio.Channel, phase: worker_pb2.Phase.ValueType, message: str
) -> None:
    """W22: work before the build."""
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
    await api.engine.set_phase(phase)
    try:
        await wait_until_health(channel, serving=False)
        error = await refusal(stub, prompt())
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert message in (error.details() or "")
    finally:
        await api.engine.set_phase(worker_pb2.PHASE_SERVING)
        await wait_until_health(channel, serving=True)


async def test_a_rebuilding_world_takes_requests(api: ApiUnderTest, channel: grpc.aio.Channel) -> None:
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
    await api.engine.set_phase(worker_pb2.PHASE_REBUILDING)
    await wait_until_health(channel, serving=False)
    chunks, _ = await generate(stub, prompt())
    assert ids_and_text(chunks)[1] == TEXT
    await api.engine.set_phase(worker_pb2.PHASE_SERVING)
    await wait_until_health(channel, serving=True)


async def test_a_lost_engine_ends_streams_and_a_new_connection_serves_again(
    api: ApiUnderTest, channel: grpc.aio.Channel
) -> None:
    stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)

    async def silent(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens(encode(api, "fox"))

    api.engine.script = silent
    received: list[int] = []

    async def read_until_it_breaks() -> None:
        async for response in stub.Generate(prompt(), timeout=SECONDS):
            received.extend(response.chunk.token_ids)
            if response.chunk.token_ids:
                api.engine.drop_connections()

    with pytest.raises(grpc.aio.AioRpcError) as error:
        await read_until_it_breaks()
    assert received == encode(api, "fox")
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    api.engine.script = replies(encode(api, TEXT))
    await wait_until_health(channel, serving=True)
    chunks, _ = await generate(stub, prompt())
    assert ids_and_text(chunks)[1] == TEXT


async def wait_until_health(channel: grpc.aio.Channel, *, serving: bool) -> None:
    wanted = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
    health: Any = health_pb2_grpc.HealthStub(channel)
    async for response in health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS):
        if response.status == wanted:
            return
