"""From what a client sent to a request that can run: tokens, resolved parameters, every field checked."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.errors import ApiError, invalid
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.sampling import ResolvedSampling, check_token_ids, resolve_sampling

MAX_KEEP_SECONDS = 600.0
_REQUEST_ID = re.compile(r"[!-~]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One prompt that can be handed to the engine."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: ResolvedSampling
    resume_token_ids: Sequence[int] = ()
    priority: int = 0
    weight_version: int | None = None
    """Only these weights may continue the stream."""
    detokenize: bool = True
    deadline: float | None = None
    """Unix seconds."""
    keep_kv: inference_pb2.KeepKv | None = None
    """The request is handed over behind its first new token."""
    kv_source: inference_pb2.KvSource | None = None
    """Another gang has begun it, and keeps its KV cache."""


async def read_request(
    request: inference_pb2.GenerateRequest, model: ServedModel, *, deadline: float | None
) -> GenerationRequest:
    """Checks a request whole.

    Args:
        request: as the client sent it.
        model: what it is checked against.
        deadline: Unix seconds.

    Raises:
        ApiError: INVALID_ARGUMENT naming the field; FAILED_PRECONDITION for what this checkpoint lacks.
    """
    check_unknown_fields(request)
    prompt = await _prompt_token_ids(request, model)
    return resolve_request(request, prompt, model, deadline=deadline)


def resolve_request(
    request: inference_pb2.GenerateRequest, prompt: Sequence[int], model: ServedModel, *, deadline: float | None
) -> GenerationRequest:
    """As read_request, for a prompt that is tokenized already; ignores request.prompt."""
    limits = model.limits
    if not prompt:
        raise invalid("prompt", "it is empty, at least one token is needed")
    check_token_ids("token_ids", prompt, limits.vocab_size)
    if len(prompt) >= limits.max_model_len:
        raise invalid(
            "prompt",
            f"it has {len(prompt)} tokens, but the context holds {limits.max_model_len}, prompt and output together",
        )
    sampling = resolve_sampling(request.sampling, limits, prompt_tokens=len(prompt), sample_index=request.sample_index)
    if sampling.stop and model.tokenizer is None:
        raise invalid("stop", "the checkpoint has no tokenizer.json: use stop_token_ids")
    _check_resume(request, sampling, limits.vocab_size)
    _check_handover(request, sampling)
    return GenerationRequest(
        request_id=check_request_id(request.request_id),
        prompt_token_ids=prompt,
        sampling=sampling,
        resume_token_ids=list(request.resume_token_ids),
        priority=request.priority,
        weight_version=request.weight_version if request.HasField("weight_version") else None,
        detokenize=(not request.HasField("detokenize") or request.detokenize) and model.tokenizer is not None,
        deadline=deadline,
        keep_kv=request.keep_kv if request.HasField("keep_kv") else None,
        kv_source=request.kv_source if request.HasField("kv_source") else None,
    )


def check_unknown_fields(message: Message, path: str = "") -> None:
    """Raises INVALID_ARGUMENT for a field that this version does not know, since it would be ignored."""
    for field in UnknownFieldSet(message):
        name = path or message.DESCRIPTOR.name
        raise invalid(name, f"field number {field.field_number} is not known to this version of the server")
    for descriptor, value in message.ListFields():
        for index, part in enumerate(_messages_in(value)):
            suffix = f"[{index}]" if descriptor.is_repeated else ""
            check_unknown_fields(part, f"{path}.{descriptor.name}{suffix}".removeprefix("."))


def check_request_id(request_id: str) -> str:
    """The client's id where it is fit for logs and headers, a new one where it is empty."""
    if not request_id:
        return uuid.uuid4().hex
    if _REQUEST_ID.fullmatch(request_id) is None:
        raise invalid("request_id", "accepted: 1 to 128 printable ASCII characters without spaces")
    return request_id


async def chat_token_ids(chat: inference_pb2.ChatPrompt, model: ServedModel) -> list[int]:
    """Ids of a conversation's prompt."""
    if not chat.messages:
        raise invalid("chat.messages", "at least one message is needed")
    text = model.render_chat(
        [{"role": message.role, "content": message.content} for message in chat.messages],
        add_generation_prompt=not chat.HasField("add_generation_prompt") or chat.add_generation_prompt,
    )
    return await model.encode(text, add_special_tokens=False)


def _messages_in(value: object) -> Iterator[Message]:
    if isinstance(value, Message):
        yield value
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        yield from (part for part in value if isinstance(part, Message))


async def _prompt_token_ids(request: inference_pb2.GenerateRequest, model: ServedModel) -> Sequence[int]:
    match request.WhichOneof("prompt"):
        case "text":
            return await model.encode(request.text, add_special_tokens=True)
        case "token_ids":
            return list(request.token_ids.ids)
        case "chat":
            return await chat_token_ids(request.chat, model)
        case _:
            raise invalid("prompt", "one of text, token_ids and chat is needed")


def _check_resume(request: inference_pb2.GenerateRequest, sampling: ResolvedSampling, vocab_size: int) -> None:
    resumed = request.resume_token_ids
    if not resumed and not request.HasField("sample_index"):
        return
    field = "resume_token_ids" if resumed else "sample_index"
    if sampling.n != 1:
        raise invalid("n", f"{sampling.n} with {field}, accepted: 1, since one sample is continued")
    if not request.sampling.HasField("seed"):
        raise invalid("seed", f"{field} needs the seed of the first stream's `started`")
    if not request.HasField("weight_version"):
        raise invalid("weight_version", f"{field} needs the weight version of the first stream's `started`")
    check_token_ids("resume_token_ids", resumed, vocab_size)
    slot = sampling.slot
    if len(resumed) > slot.max_tokens:
        raise invalid("resume_token_ids", f"{len(resumed)} ids, but the sample ends after {slot.max_tokens}")
    stop_ids = set(slot.stop_token_ids)
    for position, token_id in enumerate(resumed[:-1]):
        if token_id in stop_ids:
            raise invalid(f"resume_token_ids[{position}]", f"{token_id} ends a sample, so nothing can follow it")


def _check_handover(request: inference_pb2.GenerateRequest, sampling: ResolvedSampling) -> None:
    for field in ("keep_kv", "kv_source"):
        if request.HasField(field) and sampling.n != 1:
            raise invalid("n", f"{sampling.n} with {field}, accepted: 1, since one sample is handed over")
    if request.HasField("keep_kv") and not 0 < request.keep_kv.seconds <= MAX_KEEP_SECONDS:
        raise invalid("keep_kv.seconds", f"{request.keep_kv.seconds:g}, accepted: above 0, up to {MAX_KEEP_SECONDS:g}")
    if not request.HasField("kv_source"):
        return
    for name in ("target", "ticket"):
        if not getattr(request.kv_source, name):
            raise invalid(f"kv_source.{name}", "it is empty: give the kept_kv of the first stream's completion")
    if not request.resume_token_ids:
        raise invalid("resume_token_ids", "kv_source needs the ids of the first stream")


def check_weight_version(wanted: int | None, present: int) -> None:
    """Raises FAILED_PRECONDITION when a stream would be continued with other weights."""
    if wanted is not None and wanted != present:
        message = f"weight_version: the stream was begun with version {wanted}, this gang serves version {present}"
        raise ApiError(grpc.StatusCode.FAILED_PRECONDITION, message, field="weight_version")
