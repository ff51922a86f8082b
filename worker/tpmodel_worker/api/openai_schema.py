"""Bodies of the OpenAI endpoints. What is not honoured is refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.errors import ApiError, invalid

Uint32 = Annotated[int, Field(ge=0, lt=2**32)]
Sint32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
# The interface has signed seeds; the bits are what counts.
Seed = Annotated[int, Field(ge=-(2**63), lt=2**64)]
TokenIds = list[Uint32]

# Fields of the interface that this server does not honour, with the values that ask for nothing. null does so
# for all of them.
_UNSUPPORTED: Mapping[str, tuple[object, ...]] = MappingProxyType(
    {
        "logit_bias": ({},),
        "best_of": (1,),
        "echo": (False,),
        "suffix": ("",),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "response_format": ({"type": "text"},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "store": (False,),
        "metadata": ({},),
        "service_tier": ("auto", "default"),
        "web_search_options": (),
    }
)

# Where the interface's spelling of a sampling field is another than ours.
_SPELLINGS = MappingProxyType({"max_completion_tokens": "max_tokens", "include_stop_str_in_output": "include_stop"})

# Fields of several types, in words.
_ALTERNATIVES = MappingProxyType(
    {
        "prompt": "a text, token ids (0 to 2^32 - 1), or a list of either",
        "stop": "a text or a list of texts",
        "content": "a text or a list of text parts, {type: text, text: ...}",
    }
)


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_StrictModel):
    """How a stream is written."""

    include_usage: bool | None = None


class _GenerationBody(_StrictModel):
    """What both endpoints share. Ranges are checked by resolve_sampling()."""

    sampling_fields: ClassVar[tuple[str, ...]] = (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "max_tokens",
        "min_tokens",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "n",
        "stop_token_ids",
        "ignore_eos",
        "skip_special_tokens",
        "include_stop_str_in_output",
    )

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Uint32 | None = None
    max_tokens: Uint32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    top_k: Sint32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Uint32 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: Sint32 | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in data.keys() & _UNSUPPORTED.keys():
            value = data[name]
            if value is not None and value not in _UNSUPPORTED[name]:
                raise invalid(name, "not supported by this server")
        return {name: value for name, value in data.items() if name not in _UNSUPPORTED}

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options", "accepted with stream=true only")
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that carries the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def logprobs_wanted(self) -> int | None:
        """How many alternatives to each chosen token are wanted; None: no log-probabilities at all."""
        raise NotImplementedError

    def to_generate_request(self, request_id: str) -> inference_pb2.GenerateRequest:
        """The same request as a gRPC client would send it, without the prompt."""
        given = self.model_dump(include=set(self.sampling_fields), exclude_none=True)
        sampling = inference_pb2.SamplingParams(**{_SPELLINGS.get(name, name): value for name, value in given.items()})
        sampling.stop.extend([self.stop] if isinstance(self.stop, str) else self.stop or [])
        if self.seed is not None:
            sampling.seed = self.seed % 2**64
        logprobs = self.logprobs_wanted()
        if logprobs is not None:
            sampling.logprobs = logprobs
        return inference_pb2.GenerateRequest(sampling=sampling, request_id=request_id, priority=self.priority)


class CompletionBody(_GenerationBody):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | TokenIds | list[TokenIds]
    logprobs: Uint32 | None = None

    def logprobs_wanted(self) -> int | None:
        """See _GenerationBody."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if prompt and isinstance(prompt[0], int):
            return [[token_id for token_id in prompt if isinstance(token_id, int)]]
        return [part for part in prompt if not isinstance(part, int)]


class TextPart(_StrictModel):
    """A part of a message; only text is."""

    type: Literal["text"]
    text: str


class Message(_StrictModel):
    """One turn of a conversation."""

    role: str
    content: str | list[TextPart]
    name: str | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it: parts joined by line breaks."""
        content = self.content
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatCompletionBody(_GenerationBody):
    """Body of POST /v1/chat/completions."""

    sampling_fields = (*_GenerationBody.sampling_fields, "max_completion_tokens")

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Uint32 | None = None
    logprobs: bool | None = None
    top_logprobs: Uint32 | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs", "accepted with logprobs=true only")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise invalid("max_tokens", "superseded by max_completion_tokens: give one of them")
        return self

    def logprobs_wanted(self) -> int | None:
        """See _GenerationBody."""
        return (self.top_logprobs or 0) if self.logprobs else None


def parse_completion(body: bytes) -> CompletionBody:
    """Reads the body of a completion request; INVALID_ARGUMENT naming the field that does not fit."""
    try:
        return CompletionBody.model_validate_json(body)
    except ValidationError as error:
        raise _to_api_error(error) from error


def parse_chat_completion(body: bytes) -> ChatCompletionBody:
    """Reads the body of a chat request; INVALID_ARGUMENT naming the field that does not fit."""
    try:
        return ChatCompletionBody.model_validate_json(body)
    except ValidationError as error:
        raise _to_api_error(error) from error


def _to_api_error(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    location = [str(part) for part in first["loc"]]
    for depth, part in enumerate(location, start=1):
        # Below such a field the location names types, and there is one error for each of them.
        if part in _ALTERNATIVES and first["type"] != "missing":
            return invalid(".".join(location[:depth]), f"expected {_ALTERNATIVES[part]}")
    problem = "unknown field" if first["type"] == "extra_forbidden" else first["msg"]
    return invalid(".".join(location) or "body", problem)
