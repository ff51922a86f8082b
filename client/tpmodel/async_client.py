"""The asyncio client: the same calls as the blocking one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from tpmodel import channel as channels
from tpmodel.client import load_from, model_info_from
from tpmodel.errors import DeadlineExceededError, UnavailableError, error_from
from tpmodel.request import GenerationState, Prompt, build_request, chat_prompt
from tpmodel.types import ChatMessage, Chunk, Completion, Load, ModelInfo, Result
from tpmodel.v1 import inference_pb2, inference_pb2_grpc


class AsyncGenerateStream:
    """Iterates over the chunks of one request; resumes by itself where a server goes away in mid-stream."""

    def __init__(
        self,
        stub: Any,
        request: inference_pb2.GenerateRequest,
        *,
        metadata: tuple[tuple[str, str], ...],
        timeout: float | None,
        retry: channels.RetryPolicy,
    ) -> None:
        self._stub = stub
        self._metadata = metadata
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._retry = retry
        self._delays = retry.delays()
        self._call: grpc.aio.Call | None = None
        self._cancelled = False
        self._state = GenerationState(request)
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        """The chunks, as they arrive."""
        return self._chunks

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            TpmodelError: the request failed; what was received stays available.
        """
        return await anext(self._chunks)

    async def _read(self) -> AsyncIterator[Chunk]:
        while not self._state.finished:
            try:
                for request in self._state.pending_requests():
                    async for chunk in self._read_one(request):
                        yield chunk
            except grpc.aio.AioRpcError as error:
                typed = error_from(error)
                delay = next(self._delays, None)
                if self._cancelled or delay is None or not isinstance(typed, UnavailableError):
                    raise typed from error
                await self._sleep(delay)
            else:
                if not self._state.finished:
                    raise UnavailableError("UNAVAILABLE", "the stream ended without a completion")

    async def _read_one(self, request: inference_pb2.GenerateRequest) -> AsyncIterator[Chunk]:
        call = self._stub.Generate(request, timeout=self._remaining(), metadata=self._metadata)
        self._call = call
        try:
            async for response in call:
                chunk = self._state.receive(response)
                if chunk is not None:
                    self._delays = self._retry.delays()
                    yield chunk
        finally:
            # A reader that stops early must not leave the request running.
            call.cancel()

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def _sleep(self, delay: float) -> None:
        remaining = self._remaining()
        if remaining is not None and remaining <= delay:
            raise DeadlineExceededError("DEADLINE_EXCEEDED", "no server was available before the timeout")
        await asyncio.sleep(delay)

    def cancel(self) -> None:
        """Ends the request on the server. Idempotent."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    @property
    def request_id(self) -> str:
        """Known after the first chunk."""
        return self._state.request_id

    @property
    def completion(self) -> Completion:
        """How it ended; only after the last chunk."""
        return self._state.completion()

    async def result(self) -> Result:
        """Reads the stream to its end and returns everything."""
        async for _ in self._chunks:
            pass
        return self._state.result()


class AsyncClient:
    """asyncio client of one server or of all gangs behind a name; arguments as for Client."""

    def __init__(
        self,
        target: str,
        *,
        api_key: str | None = None,
        retry: channels.RetryPolicy | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        server_name: str = "",
    ) -> None:
        self._channel = (
            grpc.aio.insecure_channel(target, options=channels.OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=channels.options(server_name))
        )
        self._stub: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._metadata = channels.metadata(api_key)
        self._retry = retry or channels.RetryPolicy()

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: float | None = None,
        request_id: str = "",
        priority: int | None = None,
        detokenize: bool | None = None,
        keep_kv: float | None = None,
        continues: Result | None = None,
        **sampling: Any,
    ) -> AsyncGenerateStream:
        """Streams an answer; arguments as for Client.generate."""
        request = build_request(
            prompt,
            request_id=request_id,
            priority=priority,
            detokenize=detokenize,
            keep_kv=keep_kv,
            continues=continues,
            **sampling,
        )
        return AsyncGenerateStream(self._stub, request, metadata=self._metadata, timeout=timeout, retry=self._retry)

    async def complete(self, prompt: Prompt, *, timeout: float | None = None, **options: Any) -> Result:
        """The whole answer at once; takes what generate takes."""
        return await self.generate(prompt, timeout=timeout, **options).result()

    async def tokenize(self, text: str | Sequence[ChatMessage]) -> list[int]:
        """Token ids of a text, or of messages rendered with the chat template."""
        request = inference_pb2.TokenizeRequest()
        if isinstance(text, str):
            request.text = text
        else:
            request.chat.CopyFrom(chat_prompt(text))
        return list((await self._unary(self._stub.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return (await self._unary(self._stub.Detokenize, request)).text

    async def model_info(self) -> ModelInfo:
        """What the server serves."""
        return model_info_from(await self._unary(self._stub.GetModelInfo, inference_pb2.GetModelInfoRequest()))

    async def load(self) -> Load:
        """How busy the server is."""
        return load_from(await self._unary(self._stub.GetLoad, inference_pb2.GetLoadRequest()))

    async def _unary(self, method: Any, request: Any, timeout: float = 30.0) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise error_from(error) from error

    async def close(self) -> None:
        """Closes the connection. Idempotent."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self.close()
