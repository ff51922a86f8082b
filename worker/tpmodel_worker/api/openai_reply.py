"""Runs the prompts of one OpenAI request together and writes their reply."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence

from tpmodel.v1 import inference_pb2
from tpmodel_worker.api.generation import Generation
from tpmodel_worker.api.openai_format import Choice, Json, ReplyFormat, finish_reason, usage_json

_DONE = b"data: [DONE]\n\n"

Event = tuple[int, inference_pb2.GenerateResponse]
"""Which generation, and what it says."""


async def merge(generations: Sequence[Generation]) -> AsyncIterator[Event]:
    """The events of all generations, as they come; the first failure ends them all."""
    if len(generations) == 1:
        async for response in generations[0].events():
            yield 0, response
        return
    # One place: a slow client holds the generations back, whose tokens then wait in their own bounded queues.
    queue: asyncio.Queue[Event | Exception | None] = asyncio.Queue(maxsize=1)

    async def forward(index: int, generation: Generation) -> None:
        async for response in generation.events():
            await queue.put((index, response))

    async def forward_all() -> None:
        end: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for index, generation in enumerate(generations):
                    group.create_task(forward(index, generation))
        except ExceptionGroup as errors:
            end = errors.exceptions[0]
        await queue.put(end)

    task = asyncio.create_task(forward_all())
    try:
        while (event := await queue.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        task.cancel()


class Reply:
    """The choices of a reply: every prompt's samples, in order."""

    def __init__(self, generations: Sequence[Generation], form: ReplyFormat, *, include_usage: bool) -> None:
        """include_usage: end a stream with the usage."""
        self._form = form
        self._include_usage = include_usage
        self._n = generations[0].request.sampling.n
        self._choices = [Choice(index) for index in range(len(generations) * self._n)]
        self._usages: list[inference_pb2.Usage] = []

    async def whole(self, events: AsyncIterator[Event]) -> Json:
        """Reads all events and returns the reply's body."""
        async for prompt, response in events:
            if response.HasField("completion"):
                self._finish(prompt, response.completion)
                continue
            chunk = response.chunk
            choice = self._choice(prompt, chunk.sample_index)
            choice.text.append(chunk.text)
            logprobs = self._form.logprobs(choice, chunk)
            if logprobs is not None:
                choice.logprobs.append(logprobs)
        return self._form.whole(self._choices, usage_json(self._usages))

    async def stream(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[bytes]:
        """The reply as server-sent events, the last of which is [DONE].

        Args:
            first: taken from events already, to learn of refusals before the reply begins.
            events: the rest.
        """
        openings = [piece for choice in self._choices if (piece := self._form.opening(choice)) is not None]
        for piece in openings:
            yield self._event([piece])
        for piece in self._pieces(*first):
            yield self._event([piece])
        async for event in events:
            for piece in self._pieces(*event):
                yield self._event([piece])
        if self._include_usage:
            yield sse(self._form.chunk([], usage=usage_json(self._usages)))
        yield _DONE

    def _pieces(self, prompt: int, response: inference_pb2.GenerateResponse) -> list[Json]:
        if response.HasField("completion"):
            return [self._form.delta(choice, "", None) for choice in self._finish(prompt, response.completion)]
        chunk = response.chunk
        choice = self._choice(prompt, chunk.sample_index)
        logprobs = self._form.logprobs(choice, chunk)
        # The first chunk of a prompt has no tokens, and an end-of-sequence id has no text.
        return [self._form.delta(choice, chunk.text, logprobs)] if chunk.text or logprobs else []

    def _finish(self, prompt: int, completion: inference_pb2.GenerateCompletion) -> list[Choice]:
        self._usages.append(completion.usage)
        finished = []
        for sample in completion.samples:
            choice = self._choice(prompt, sample.sample_index)
            choice.finish_reason = finish_reason(sample)
            finished.append(choice)
        return finished

    def _choice(self, prompt: int, sample_index: int) -> Choice:
        return self._choices[prompt * self._n + sample_index]

    def _event(self, pieces: list[Json]) -> bytes:
        # With usage at the end, the interface has a null in every chunk before.
        return sse(self._form.chunk(pieces, usage=None) if self._include_usage else self._form.chunk(pieces))


def sse(body: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
