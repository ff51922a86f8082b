"""The blocking client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from tpmodel import channel as channels
from tpmodel.errors import DeadlineExceededError, UnavailableError, error_from
from tpmodel.request import GenerationState, Prompt, build_request, chat_prompt
from tpmodel.types import ChatMessage, Chunk, Completion, Load, ModelInfo, Result
from tpmodel.v1 import inference_pb2, inference_pb2_grpc


class GenerateStream:
    """Iterates over the chunks of one request; resumes by itself where a server goes away in mid-stream."""

    def __init__(
        self,
        stub: inference_pb2_grpc.InferenceServiceStub,
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
        self._call: grpc.Call | None = None
        self._cancelled = False
        self._state = GenerationState(request)
        self._chunks = self._read()

    def __iter__(self) -> Iterator[Chunk]:
        """The chunks, as they arrive."""
        return self._chunks

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
            TpmodelError: the request failed; what was received stays available.
        """
        return next(self._chunks)

    def _read(self) -> Iterator[Chunk]:
        while not self._state.finished:
            try:
                for request in self._state.pending_requests():
                    yield from self._read_one(request)
            except grpc.RpcError as error:
                typed = error_from(error)
                delay = next(self._delays, None)
                if self._cancelled or delay is None or not isinstance(typed, UnavailableError):
                    raise typed from error
                self._sleep(delay)
            else:
                if not self._state.finished:
                    raise UnavailableError("UNAVAILABLE", "the stream ended without a completion")

    def _read_one(self, request: inference_pb2.GenerateRequest) -> Iterator[Chunk]:
        call = self._stub.Generate(request, timeout=self._remaining(), metadata=self._metadata)
        self._call = call
        try:
            for response in call:
                chunk = self._state.receive(response)
                if chunk is not None:
                    self._delays = self._retry.delays()
                    yield chunk
        finally:
            # A reader that stops early must not leave the request running.
            call.cancel()

    def _remaining(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _sleep(self, delay: float) -> None:
        remaining = self._remaining()
        if remaining is not None and remaining <= delay:
            raise DeadlineExceededError("DEADLINE_EXCEEDED", "no server was available before the timeout")
        time.sleep(delay)

    def cancel(self) -> None:
        """Ends the request on the server. From any thread; idempotent."""
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

    def result(self) -> Result:
        """Reads the stream to its end and returns everything."""
        for _ in self._chunks:
            pass
        return self._state.result()


class Client:
    """Blocking client of one server or of all gangs behind a name.

    target: host:port, or any gRPC target such as dns:///qwen-leaders.default.svc:9000.
    credentials: for a server that speaks TLS, such as grpc.ssl_channel_credentials(root_certificates).
    server_name: what its certificate must be for, where that is not the target's host, as behind a tunnel.
    """

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
            grpc.insecure_channel(target, options=channels.OPTIONS)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=channels.options(server_name))
        )
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)
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
    ) -> GenerateStream:
        """Streams an answer to a text, token ids or chat messages.

        sampling: fields of SamplingParams, such as max_tokens=64, temperature=0, stop=["\\n"], n=2.
        timeout: seconds for the whole request, resumptions included.
        """
        request = build_request(
            prompt,
            request_id=request_id,
            priority=priority,
            detokenize=detokenize,
            keep_kv=keep_kv,
            continues=continues,
            **sampling,
        )
        return GenerateStream(self._stub, request, metadata=self._metadata, timeout=timeout, retry=self._retry)

    def complete(self, prompt: Prompt, *, timeout: float | None = None, **options: Any) -> Result:
        """The whole answer at once; takes what generate takes."""
        return self.generate(prompt, timeout=timeout, **options).result()

    def tokenize(self, text: str | Sequence[ChatMessage]) -> list[int]:
        """Token ids of a text, or of messages rendered with the chat template."""
        request = inference_pb2.TokenizeRequest()
        if isinstance(text, str):
            request.text = text
        else:
            request.chat.CopyFrom(chat_prompt(text))
        return list(self._unary(self._stub.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(token_ids=token_ids, skip_special_tokens=skip_special_tokens)
        return self._unary(self._stub.Detokenize, request).text

    def model_info(self) -> ModelInfo:
        """What the server serves."""
        return model_info_from(self._unary(self._stub.GetModelInfo, inference_pb2.GetModelInfoRequest()))

    def load(self) -> Load:
        """How busy the server is."""
        return load_from(self._unary(self._stub.GetLoad, inference_pb2.GetLoadRequest()))

    def _unary(self, method: Any, request: Any, timeout: float = 30.0) -> Any:
        try:
            return method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_from(error) from error

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._channel.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the connection."""
        self.close()


def model_info_from(reply: inference_pb2.GetModelInfoResponse) -> ModelInfo:
    """The reply as a plain value."""
    return ModelInfo(
        model_id=reply.model_id,
        served_name=reply.served_name,
        model_type=reply.model_type,
        max_model_len=reply.max_model_len,
        vocab_size=reply.vocab_size,
        world_size=reply.world_size,
        dtype=reply.dtype,
        weight_version=reply.weight_version,
        has_chat_template=reply.has_chat_template,
    )


def load_from(reply: inference_pb2.GetLoadResponse) -> Load:
    """The reply as a plain value."""
    return Load(reply.running, reply.waiting, reply.queue_limit, reply.kv_blocks_total, reply.kv_blocks_used)
