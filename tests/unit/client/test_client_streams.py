"""Client and AsyncClient against a scripted server over real gRPC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from tpmodel import (
    AsyncClient,
    ChatMessage,
    Client,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    WeightVersionError,
)
from tpmodel.channel import RetryPolicy
from tpmodel.v1 import inference_pb2 as pb

ANSWER = list(range(100, 112))
SEED = 77
VERSION = 3
QUICK = RetryPolicy(window=5.0, first_delay=0.01, longest_delay=0.05)

Handler = Callable[[pb.GenerateRequest, grpc.ServicerContext], Iterator[pb.GenerateResponse]]


class ScriptedService:
    """Answers each Generate with the next handler; remembers the requests."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = list(handlers)
        self.requests: list[pb.GenerateRequest] = []

    def generate(self, request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        self.requests.append(request)
        return self.handlers.pop(0)(request, context)


@contextmanager
def serving(service: ScriptedService) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(4))
    method = grpc.unary_stream_rpc_method_handler(
        service.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    handlers = grpc.method_handlers_generic_handler("tpmodel.v1.InferenceService", {"Generate": method})
    server.add_generic_rpc_handlers((handlers,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None)


def started(request: pb.GenerateRequest) -> pb.GenerateResponse:
    seed = request.sampling.seed if request.sampling.HasField("seed") else SEED
    start = pb.GenerateStarted(request_id="r1", seed=seed, weight_version=VERSION, prompt_tokens=2)
    return pb.GenerateResponse(chunk=pb.GenerateChunk(started=start))


def tokens(ids: list[int], sample_index: int = 0) -> pb.GenerateResponse:
    text = "".join(f"<{token}>" for token in ids)
    return pb.GenerateResponse(chunk=pb.GenerateChunk(sample_index=sample_index, token_ids=ids, text=text))


def ended(*sample_indices: int) -> pb.GenerateResponse:
    samples = [
        pb.SampleCompletion(sample_index=index, finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=len(ANSWER))
        for index in sample_indices
    ]
    usage = pb.Usage(prompt_tokens=2, completion_tokens=len(ANSWER) * len(samples))
    return pb.GenerateResponse(
        completion=pb.GenerateCompletion(samples=samples, usage=usage, weight_versions=[VERSION])
    )


def whole(request: pb.GenerateRequest, _context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """The rest of the answer, as a real server gives it to a resumed request."""
    yield started(request)
    for token in ANSWER[len(request.resume_token_ids) :]:
        yield tokens([token], request.sample_index)
    yield ended(request.sample_index)


def breaking_after(count: int, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Handler:
    def handler(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        for token in ANSWER[len(request.resume_token_ids) :][:count]:
            yield tokens([token])
        context.abort(code, "scripted break")

    return handler


def refusing(code: grpc.StatusCode, message: str) -> Handler:
    def handler(_request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        context.abort(code, message)
        yield pb.GenerateResponse()

    return handler


def test_a_whole_answer_has_ids_text_and_usage() -> None:
    with serving(ScriptedService(whole)) as target, Client(target) as client:
        result = client.complete("hello")
    assert result.token_ids == (tuple(ANSWER),)
    assert result.text == "".join(f"<{token}>" for token in ANSWER)
    assert result.completion.usage.completion_tokens == len(ANSWER)
    assert result.completion.samples[0].finish_reason == "length"
    assert result.seed == SEED


def test_a_stream_that_breaks_twice_is_resumed_without_loss_or_repetition() -> None:
    service = ScriptedService(breaking_after(3), breaking_after(4), whole)
    with serving(service) as target, Client(target, retry=QUICK) as client:
        ids = [token for chunk in client.generate("hello") for token in chunk.token_ids]
    assert ids == ANSWER
    resumed = service.requests[2]
    assert list(resumed.resume_token_ids) == ANSWER[:7]
    assert (resumed.sampling.seed, resumed.weight_version, resumed.request_id) == (SEED, VERSION, "r1")


async def test_the_async_client_resumes_as_well() -> None:
    service = ScriptedService(breaking_after(5), whole)
    with serving(service) as target:
        async with AsyncClient(target, retry=QUICK) as client:
            ids = [token async for chunk in client.generate("hello") for token in chunk.token_ids]
    assert ids == ANSWER
    assert list(service.requests[1].resume_token_ids) == ANSWER[:5]


def test_a_broken_stream_of_two_samples_resumes_only_the_unfinished_one() -> None:
    def first(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        yield started(request)
        yield tokens(ANSWER, 0)
        yield ended(0)
        yield tokens(ANSWER[:2], 1)
        context.abort(grpc.StatusCode.UNAVAILABLE, "scripted break")

    service = ScriptedService(first, whole)
    with serving(service) as target, Client(target, retry=QUICK) as client:
        result = client.complete("hello", n=2)
    assert result.token_ids == (tuple(ANSWER), tuple(ANSWER))
    assert len(service.requests) == 2
    assert (service.requests[1].sample_index, service.requests[1].sampling.n) == (1, 1)
    assert list(service.requests[1].resume_token_ids) == ANSWER[:2]


def test_unavailable_before_the_first_token_is_tried_again_with_the_same_request() -> None:
    service = ScriptedService(refusing(grpc.StatusCode.UNAVAILABLE, "world not built yet"), whole)
    with serving(service) as target, Client(target, retry=QUICK) as client:
        assert client.complete("hello", seed=5).token_ids == (tuple(ANSWER),)
    assert service.requests[0] == service.requests[1]


def test_unavailable_past_the_retry_window_is_an_error() -> None:
    handler = refusing(grpc.StatusCode.UNAVAILABLE, "world not built yet")
    policy = RetryPolicy(window=0.05, first_delay=0.02)
    with serving(ScriptedService(*[handler] * 20)) as target, Client(target, retry=policy) as client:
        with pytest.raises(UnavailableError, match="world not built yet"):
            client.complete("hello")


def test_a_timeout_covers_all_tries() -> None:
    handler = refusing(grpc.StatusCode.UNAVAILABLE, "world not built yet")
    policy = RetryPolicy(window=60, first_delay=0.1)
    with serving(ScriptedService(*[handler] * 50)) as target, Client(target, retry=policy) as client:
        with pytest.raises(DeadlineExceededError):
            client.complete("hello", timeout=0.3)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, OverloadedError),
        (grpc.StatusCode.FAILED_PRECONDITION, WeightVersionError),
    ],
)
def test_errors_are_typed_and_not_retried(code: grpc.StatusCode, expected: type[Exception]) -> None:
    service = ScriptedService(refusing(code, "scripted"))
    with serving(service) as target, Client(target, retry=QUICK) as client:
        with pytest.raises(expected, match="scripted"):
            client.complete("hello")
    assert len(service.requests) == 1


def test_breaking_out_of_a_stream_cancels_it_on_the_server() -> None:
    cancelled: list[bool] = []

    def endless(request: pb.GenerateRequest, context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
        context.add_callback(lambda: cancelled.append(True))
        yield started(request)
        while context.is_active():
            yield tokens([1])

    with serving(ScriptedService(endless)) as target, Client(target) as client:
        stream = client.generate("hello")
        next(stream)
        stream.cancel()
        with pytest.raises(Exception, match="CANCELLED"):
            stream.result()
    assert cancelled


def test_chat_messages_travel_as_chat() -> None:
    service = ScriptedService(whole)
    with serving(service) as target, Client(target) as client:
        client.complete([ChatMessage("user", "hi")], stop="x")
    assert service.requests[0].chat.messages[0].content == "hi"
    assert list(service.requests[0].sampling.stop) == ["x"]


def test_an_unknown_sampling_field_is_refused_by_name() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError, match="temprature"):
        client.generate("hello", temprature=1)


def test_an_empty_list_is_no_prompt() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match="prompt is empty"):
        client.generate([])


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("hello", {"max_tokens": 1 << 40}, "max_tokens"),
        ("hello", {"seed": -1}, "seed"),
        ("hello", {"priority": 1 << 40}, "priority"),
        ([1, 1 << 40], {}, "token_ids"),
    ],
)
def test_a_number_that_its_field_cannot_hold_is_refused_by_name(
    prompt: Any, options: dict[str, Any], field: str
) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequestError, match=f"^{field}: "):
        client.generate(prompt, **options)


def kept(request: pb.GenerateRequest, _context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """The part of a server that keeps the KV cache."""
    yield started(request)
    yield tokens(ANSWER[:1])
    sample = pb.SampleCompletion(finish_reason=pb.FINISH_REASON_KEPT, completion_tokens=1)
    source = pb.KvSource(target="10.0.0.7:9001", ticket="t")
    yield pb.GenerateResponse(
        completion=pb.GenerateCompletion(samples=[sample], weight_versions=[VERSION], kept_kv=source)
    )


def continued(request: pb.GenerateRequest, _context: grpc.ServicerContext) -> Iterator[pb.GenerateResponse]:
    """The part of the server that continues."""
    yield started(request)
    yield tokens(ANSWER[1:])
    sample = pb.SampleCompletion(finish_reason=pb.FINISH_REASON_LENGTH, completion_tokens=len(ANSWER))
    yield pb.GenerateResponse(completion=pb.GenerateCompletion(samples=[sample], weight_versions=[VERSION]))


def test_another_server_is_given_what_it_needs_to_continue() -> None:
    """The ticket, the ids so far, the seed that was drawn and the weight version."""
    first_service, second_service = ScriptedService(kept), ScriptedService(continued)
    with serving(first_service) as prefill, serving(second_service) as decode:
        with Client(prefill) as client, Client(decode) as other:
            first = client.complete([1, 2], keep_kv=5.0, temperature=0.7)
            result = other.complete([1, 2], continues=first, temperature=0.7)
    assert first_service.requests[0].keep_kv.seconds == 5.0
    (request,) = second_service.requests
    assert (request.kv_source.target, request.kv_source.ticket) == ("10.0.0.7:9001", "t")
    assert list(request.resume_token_ids) == ANSWER[:1]
    assert (request.sampling.seed, request.weight_version) == (SEED, VERSION)
    assert not request.HasField("keep_kv")
    assert result.token_ids[0] == tuple(ANSWER)


def test_an_answer_that_was_whole_can_not_be_continued() -> None:
    with serving(ScriptedService(continued)) as target, Client(target) as client:
        first = client.complete([1, 2], keep_kv=5.0)
        with pytest.raises(InvalidRequestError, match="it ended by length"):
            client.complete([1, 2], continues=first)
