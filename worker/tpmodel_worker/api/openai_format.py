"""Replies of the OpenAI endpoints, built from the events of Generation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.tokenizer import Tokenizer

Json = dict[str, Any]

_FINISH_REASONS = {inference_pb2.FINISH_REASON_STOP: "stop", inference_pb2.FINISH_REASON_LENGTH: "length"}


def finish_reason(sample: inference_pb2.SampleCompletion) -> str:
    """How the interface calls a sample's end."""
    return _FINISH_REASONS[sample.finish_reason]


@dataclass(slots=True)
class Choice:
    """What a reply says of one sample so far."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[Json] = field(default_factory=list)
    """One entry for each chunk."""
    finish_reason: str | None = None
    text_offset: int = 0
    """Characters of the tokens whose log-probabilities were written."""


def usage_json(usages: Sequence[inference_pb2.Usage]) -> Json:
    """The sum over all prompts of a request."""
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


class ReplyFormat(ABC):
    """Writes one request's reply, whole or as a stream's chunks."""

    object_name: str
    chunk_object_name: str
    id_prefix: str

    def __init__(self, *, request_id: str, created: int, model: str, tokenizer: Tokenizer | None) -> None:
        """created: Unix seconds; model: as clients call it; tokenizer: for the bytes of single tokens."""
        self._head = {"id": f"{self.id_prefix}-{request_id}", "created": created, "model": model}
        self._tokenizer = tokenizer

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        """The reply of a request that is not streamed."""
        return {
            **self._head,
            "object": self.object_name,
            "choices": [self._whole_choice(choice) for choice in choices],
            "usage": usage,
        }

    def chunk(self, choices: list[Json], **others: object) -> Json:
        """One event of a stream."""
        return {**self._head, "object": self.chunk_object_name, "choices": choices, **others}

    @abstractmethod
    def opening(self, choice: Choice) -> Json | None:
        """What a stream says of a sample before its first token."""

    @abstractmethod
    def delta(self, choice: Choice, text: str, logprobs: Json | None) -> Json:
        """A stream's next piece of a sample; its end where choice.finish_reason is set."""

    @abstractmethod
    def logprobs(self, choice: Choice, chunk: inference_pb2.GenerateChunk) -> Json | None:
        """A chunk's log-probabilities, None where none were asked for."""

    @abstractmethod
    def _whole_choice(self, choice: Choice) -> Json: ...


class CompletionFormat(ReplyFormat):
    """Replies of /v1/completions."""

    object_name = chunk_object_name = "text_completion"
    id_prefix = "cmpl"

    def opening(self, choice: Choice) -> Json | None:
        """See ReplyFormat."""
        return None

    def delta(self, choice: Choice, text: str, logprobs: Json | None) -> Json:
        """See ReplyFormat."""
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def logprobs(self, choice: Choice, chunk: inference_pb2.GenerateChunk) -> Json | None:
        """See ReplyFormat."""
        if not chunk.logprobs:
            return None
        offsets = []
        for entry in chunk.logprobs:
            offsets.append(choice.text_offset)
            choice.text_offset += len(entry.text)
        return {
            "tokens": [entry.text for entry in chunk.logprobs],
            "token_logprobs": [entry.logprob for entry in chunk.logprobs],
            "top_logprobs": [
                {top.text: top.logprob for top in reversed(entry.top)} | {entry.text: entry.logprob}
                for entry in chunk.logprobs
            ],
            "text_offset": offsets,
        }

    def _whole_choice(self, choice: Choice) -> Json:
        logprobs: Json | None = None
        if choice.logprobs:
            logprobs = {key: [item for part in choice.logprobs for item in part[key]] for key in choice.logprobs[0]}
        return self.delta(choice, "".join(choice.text), logprobs)


class ChatFormat(ReplyFormat):
    """Replies of /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self, choice: Choice) -> Json | None:
        """See ReplyFormat."""
        return self._piece(choice, {"role": "assistant", "content": ""}, None)

    def delta(self, choice: Choice, text: str, logprobs: Json | None) -> Json:
        """See ReplyFormat."""
        return self._piece(choice, {"content": text} if text or logprobs else {}, logprobs)

    def logprobs(self, choice: Choice, chunk: inference_pb2.GenerateChunk) -> Json | None:
        """See ReplyFormat."""
        if not chunk.logprobs:
            return None
        content = []
        for token_id, entry in zip(chunk.token_ids, chunk.logprobs, strict=True):
            top = [self._token(other.token_id, other.text, other.logprob) for other in entry.top]
            content.append(self._token(token_id, entry.text, entry.logprob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, text: str, logprob: float) -> Json:
        raw = self._tokenizer.token_bytes(token_id) if self._tokenizer is not None else text.encode()
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _piece(self, choice: Choice, delta: Json, logprobs: Json | None) -> Json:
        return {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": choice.finish_reason}

    def _whole_choice(self, choice: Choice) -> Json:
        logprobs: Json | None = None
        if choice.logprobs:
            content = [entry for part in choice.logprobs for entry in part["content"]]
            logprobs = {"content": content, "refusal": None}
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": logprobs,
            "finish_reason": choice.finish_reason,
        }
