"""Requests and replies of a Generate stream, without any I/O: what both clients share.

A GenerationState makes the first request, reads replies, and after a broken stream makes the requests that
continue it from the ids received so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tpmodel.errors import InvalidRequestError
from tpmodel.types import ChatMessage, Chunk, Completion, FinishReason, Kept, Result, Sample, TokenLogprob, Usage
from tpmodel.v1 import inference_pb2

Prompt = str | Sequence[int] | Sequence[ChatMessage]
SAMPLING_FIELDS = frozenset(inference_pb2.SamplingParams.DESCRIPTOR.fields_by_name)
_FINISH_REASONS: Mapping[int, FinishReason] = {
    inference_pb2.FINISH_REASON_STOP: "stop",
    inference_pb2.FINISH_REASON_LENGTH: "length",
    inference_pb2.FINISH_REASON_KEPT: "kept",
}


def build_request(
    prompt: Prompt,
    *,
    request_id: str = "",
    priority: int | None = None,
    detokenize: bool | None = None,
    keep_kv: float | None = None,
    continues: Result | None = None,
    **sampling: Any,
) -> inference_pb2.GenerateRequest:
    """A request from a text, token ids or chat messages, and any fields of SamplingParams.

    keep_kv: seconds that the server keeps the KV cache behind the first token, for another one to continue.
    continues: what came of that, for the other one.

    Raises:
        TypeError: a sampling field that does not exist, or of the wrong type.
        InvalidRequestError: a number that its field cannot hold, or an empty list as prompt.
    """
    unknown = sorted(set(sampling) - SAMPLING_FIELDS)
    if unknown:
        raise TypeError(f"unknown sampling field {unknown[0]!r}: known are {', '.join(sorted(SAMPLING_FIELDS))}")
    given = {name: value for name, value in sampling.items() if value is not None}
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    request = inference_pb2.GenerateRequest(request_id=request_id, detokenize=detokenize)
    with _naming("priority", priority):
        request.MergeFrom(inference_pb2.GenerateRequest(priority=priority))
    for name, value in given.items():
        with _naming(name, value):
            request.sampling.MergeFrom(inference_pb2.SamplingParams(**{name: value}))
    set_prompt(request, prompt)
    if keep_kv is not None:
        request.keep_kv.seconds = keep_kv
    if continues is not None:
        _continue(request, continues)
    return request


def _continue(request: inference_pb2.GenerateRequest, first: Result) -> None:
    kept = first.completion.kept
    if kept is None:
        reason = first.completion.samples[0].finish_reason
        message = f"continues: that answer is whole (it ended by {reason}): nothing was kept"
        raise InvalidRequestError("INVALID_ARGUMENT", message)
    request.kv_source.target, request.kv_source.ticket = kept.target, kept.ticket
    request.resume_token_ids.extend(first.token_ids[0])
    request.weight_version = first.completion.weight_versions[-1]
    request.sampling.seed = first.seed
    request.sample_index = first.completion.samples[0].sample_index


@contextmanager
def _naming(field: str, value: object) -> Iterator[None]:
    """Says which field cannot hold its number; protobuf does not."""
    try:
        yield
    except ValueError as error:
        raise InvalidRequestError("INVALID_ARGUMENT", f"{field}: {value} is more than the field can hold") from error


def set_prompt(request: inference_pb2.GenerateRequest, prompt: Prompt) -> None:
    """Fills in whichever kind of prompt it is."""
    if isinstance(prompt, str):
        request.text = prompt
        return
    if not prompt:
        raise InvalidRequestError("INVALID_ARGUMENT", "prompt is empty: give a text, token ids or chat messages")
    if isinstance(prompt[0], ChatMessage):
        request.chat.CopyFrom(chat_prompt(prompt))
        return
    try:
        request.token_ids.ids.extend(prompt)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise InvalidRequestError("INVALID_ARGUMENT", "token_ids: one of them is no id: 0 to 2^32 - 1") from error


def chat_prompt(messages: Sequence[Any]) -> inference_pb2.ChatPrompt:
    """The messages as the protocol has them."""
    return inference_pb2.ChatPrompt(
        messages=[inference_pb2.ChatMessage(role=message.role, content=message.content) for message in messages]
    )


@dataclass(slots=True)
class _SampleState:
    token_ids: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    ended: Sample | None = None


class GenerationState:
    """Everything received of one request, over one stream or several."""

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self.request = request
        self.request_id = request.request_id
        self.seed: int | None = request.sampling.seed if request.sampling.HasField("seed") else None
        self.weight_version: int | None = None
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.weight_versions: list[int] = []
        self._kept: Kept | None = None
        first = request.sample_index
        count = request.sampling.n if request.sampling.HasField("n") else 1
        self._samples = {index: _SampleState() for index in range(first, first + max(1, count))}
        if request.resume_token_ids:
            self._samples[first].token_ids.extend(request.resume_token_ids)

    @property
    def started(self) -> bool:
        """True once the server has accepted the request: from there a new stream must be a resumed one."""
        return self.weight_version is not None

    @property
    def finished(self) -> bool:
        """True once every sample has ended."""
        return all(sample.ended for sample in self._samples.values())

    def pending_requests(self) -> list[inference_pb2.GenerateRequest]:
        """The requests that bring what is missing: the first one whole, or one for each unfinished sample."""
        if not self.started:
            return [self.request]
        return [self._resumed(index, sample) for index, sample in self._samples.items() if not sample.ended]

    def _resumed(self, index: int, sample: _SampleState) -> inference_pb2.GenerateRequest:
        request = inference_pb2.GenerateRequest()
        request.CopyFrom(self.request)
        request.sampling.n = 1
        request.sampling.seed = self.seed or 0
        request.request_id = self.request_id
        request.sample_index = index
        request.weight_version = self.weight_version or 0
        request.resume_token_ids[:] = sample.token_ids
        # What was fetched for the broken stream is gone; any server computes it again.
        request.ClearField("kv_source")
        return request

    def receive(self, response: inference_pb2.GenerateResponse) -> Chunk | None:
        """Takes one reply in; returns its chunk when it has tokens."""
        if response.HasField("completion"):
            self._complete(response.completion)
            return None
        chunk = response.chunk
        if chunk.HasField("started"):
            self._start(chunk.started)
        if not chunk.token_ids and not chunk.text:
            return None
        sample = self._samples[chunk.sample_index]
        logprobs = tuple(
            TokenLogprob(token, entry.logprob, entry.text, tuple((t.token_id, t.logprob, t.text) for t in entry.top))
            for token, entry in zip(chunk.token_ids, chunk.logprobs, strict=False)
        )
        sample.token_ids.extend(chunk.token_ids)
        sample.texts.append(chunk.text)
        sample.logprobs.extend(logprobs)
        return Chunk(chunk.sample_index, tuple(chunk.token_ids), chunk.text, logprobs)

    def _start(self, started: inference_pb2.GenerateStarted) -> None:
        self.request_id = started.request_id
        self.seed = started.seed
        self.weight_version = started.weight_version
        self.prompt_tokens = started.prompt_tokens

    def _complete(self, completion: inference_pb2.GenerateCompletion) -> None:
        self.cached_tokens = max(self.cached_tokens, completion.usage.cached_tokens)
        for version in completion.weight_versions:
            if version not in self.weight_versions:
                self.weight_versions.append(version)
        if completion.HasField("kept_kv"):
            self._kept = Kept(completion.kept_kv.target, completion.kept_kv.ticket)
        for ended in completion.samples:
            reason = _FINISH_REASONS[ended.finish_reason]
            sample = Sample(ended.sample_index, reason, ended.stop, ended.completion_tokens)
            self._samples[ended.sample_index].ended = sample

    def completion(self) -> Completion:
        """The end of the whole request.

        Raises:
            RuntimeError: a sample has not ended yet.
        """
        ended = tuple(sample.ended for sample in self._samples.values() if sample.ended)
        if len(ended) < len(self._samples):
            raise RuntimeError("the stream has not ended: read it to its end first")
        tokens = sum(sample.completion_tokens for sample in ended)
        usage = Usage(self.prompt_tokens, tokens, self.cached_tokens)
        return Completion(ended, usage, tuple(self.weight_versions), self._kept)

    def result(self) -> Result:
        """All that was received. Raises as completion."""
        samples = list(self._samples.values())
        return Result(
            request_id=self.request_id,
            seed=self.seed or 0,
            texts=tuple("".join(sample.texts) for sample in samples),
            token_ids=tuple(tuple(sample.token_ids) for sample in samples),
            logprobs=tuple(tuple(sample.logprobs) for sample in samples),
            completion=self.completion(),
        )
