"""A request is checked whole before it reaches the engine; refusals name field and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from support.served_model import make_served_model
from support.text_checkpoint import END
from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.errors import ApiError
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.requests import GenerationRequest, check_weight_version, read_request

RESUME: dict[str, Any] = {
    "sampling": inference_pb2.SamplingParams(seed=5),
    "resume_token_ids": [7, 8],
    "weight_version": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    return make_served_model(tmp_path_factory.mktemp("model"))


async def read(model: ServedModel, **fields: Any) -> GenerationRequest:
    fields = {"text": "hello"} | fields if not fields.keys() & {"text", "token_ids", "chat"} else fields
    return await read_request(inference_pb2.GenerateRequest(**fields), model, deadline=None)


async def refused(model: ServedModel, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        await read(model, **fields)
    return refusal.value


async def test_a_text_is_tokenized(model: ServedModel) -> None:
    assert model.tokenizer is not None
    expected = model.tokenizer.encode("Grüße", add_special_tokens=True)
    assert (await read(model, text="Grüße")).prompt_token_ids == expected


async def test_a_long_text_is_tokenized_alike(model: ServedModel) -> None:
    assert model.tokenizer is not None
    text = "the quick brown fox " * 300
    assert await model.encode(text, add_special_tokens=True) == model.tokenizer.encode(text, add_special_tokens=True)


async def test_a_conversation_goes_through_the_template(model: ServedModel) -> None:
    assert model.tokenizer is not None
    message = inference_pb2.ChatMessage(role="user", content="hi")
    request = await read(model, chat=inference_pb2.ChatPrompt(messages=[message]))
    text = model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False)
    assert text == f"<|start|>user\nhi{END}\n<|start|>assistant\n"
    open_end = inference_pb2.ChatPrompt(messages=[message], add_generation_prompt=False)
    request = await read(model, chat=open_end)
    assert model.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False).endswith(f"hi{END}\n")


async def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(model: ServedModel) -> None:
    error = await refused(model, token_ids=inference_pb2.TokenIds(ids=[5] * 512))
    assert error.code == grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt: it has 512 tokens, but the context holds 512" in error.message
    assert len((await read(model, token_ids=inference_pb2.TokenIds(ids=[5] * 511))).prompt_token_ids) == 511


@pytest.mark.parametrize(
    "fields", [{"text": ""}, {"token_ids": inference_pb2.TokenIds()}, {"chat": inference_pb2.ChatPrompt()}]
)
async def test_an_empty_prompt_is_refused(model: ServedModel, fields: dict[str, Any]) -> None:
    assert (await refused(model, **fields)).code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_missing_prompt_is_refused(model: ServedModel) -> None:
    with pytest.raises(ApiError, match="prompt: one of text, token_ids and chat is needed"):
        await read_request(inference_pb2.GenerateRequest(), model, deadline=None)


async def test_an_id_outside_the_vocabulary_is_refused(model: ServedModel) -> None:
    size = model.config.vocab_size
    error = await refused(model, token_ids=inference_pb2.TokenIds(ids=[1, size]))
    assert error.message == f"token_ids[1]: {size} is out of range, accepted: [0, {size - 1}]"


@pytest.mark.parametrize(
    ("build", "where"),
    [
        (inference_pb2.GenerateRequest.FromString, "GenerateRequest"),
        (
            lambda unknown: inference_pb2.GenerateRequest(sampling=inference_pb2.SamplingParams.FromString(unknown)),
            "sampling",
        ),
        (
            lambda unknown: inference_pb2.GenerateRequest(
                chat=inference_pb2.ChatPrompt(
                    messages=[inference_pb2.ChatMessage(), inference_pb2.ChatMessage.FromString(unknown)]
                )
            ),
            r"chat\.messages\[1\]",
        ),
    ],
)
async def test_an_unknown_field_is_refused_by_number(model: ServedModel, build: Any, where: str) -> None:
    """It would be ignored otherwise."""
    unknown = b"\xa0\x1f\x01"  # field 500, varint 1
    with pytest.raises(ApiError, match=f"{where}: field number 500 is not known"):
        await read_request(build(unknown), model, deadline=None)


@pytest.mark.parametrize("request_id", ["a b", "x\n", "é", "x" * 129])
async def test_an_id_unfit_for_logs_is_refused(model: ServedModel, request_id: str) -> None:
    assert (await refused(model, request_id=request_id)).field == "request_id"


async def test_an_id_is_drawn_where_the_client_sent_none(model: ServedModel) -> None:
    assert (await read(model)).request_id != (await read(model)).request_id
    assert (await read(model, request_id="mine")).request_id == "mine"


async def test_a_resumed_stream_is_taken_over(model: ServedModel) -> None:
    request = await read(model, sample_index=4, **RESUME)
    assert (request.resume_token_ids, request.weight_version) == ([7, 8], 3)
    assert (request.sampling.slot.sample_index, request.sampling.slot.seed) == (4, 5)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sampling": inference_pb2.SamplingParams(seed=5, n=2)}, "n"),
        ({"sampling": inference_pb2.SamplingParams()}, "seed"),
        ({"weight_version": None}, "weight_version"),
        ({"resume_token_ids": [7, 10_000]}, "resume_token_ids[1]"),
        ({"resume_token_ids": [1, 7]}, "resume_token_ids[0]"),
        ({"sampling": inference_pb2.SamplingParams(seed=5, max_tokens=1)}, "resume_token_ids"),
        ({"resume_token_ids": [], "sample_index": 1, "weight_version": None}, "weight_version"),
    ],
)
async def test_what_cannot_be_resumed_is_refused_by_field(
    model: ServedModel, change: dict[str, Any], field: str
) -> None:
    assert (await refused(model, **(RESUME | change))).field == field


def test_other_weights_cannot_continue_a_stream() -> None:
    check_weight_version(None, 4)
    check_weight_version(4, 4)
    with pytest.raises(ApiError) as refusal:
        check_weight_version(3, 4)
    assert refusal.value.code == grpc.StatusCode.FAILED_PRECONDITION


async def test_without_tokenizer_ids_are_served_and_text_is_refused(tmp_path: Path) -> None:
    model = make_served_model(tmp_path, with_tokenizer=False)
    request = await read(model, token_ids=inference_pb2.TokenIds(ids=[5]))
    assert request.detokenize is False
    assert (await refused(model, text="hello")).code == grpc.StatusCode.FAILED_PRECONDITION
    message = inference_pb2.ChatMessage(role="user", content="hi")
    chat = inference_pb2.ChatPrompt(messages=[message])
    assert (await refused(model, chat=chat)).code == grpc.StatusCode.FAILED_PRECONDITION
    stop = inference_pb2.SamplingParams(stop=["x"])
    assert (await refused(model, token_ids=inference_pb2.TokenIds(ids=[5]), sampling=stop)).field == "stop"
