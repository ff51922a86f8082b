"""The HTTP side: OpenAI endpoints, health and metrics."""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tpmodel_worker.api.engine_link import EngineLink
from tpmodel_worker.api.errors import ApiError, invalid
from tpmodel_worker.api.generation import Generation
from tpmodel_worker.api.metrics import ApiMetrics, RequestOutcome, render_all
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.openai_format import ChatFormat, CompletionFormat, ReplyFormat
from tpmodel_worker.api.openai_reply import Reply, merge, sse
from tpmodel_worker.api.openai_schema import (
    ChatCompletionBody,
    CompletionBody,
    parse_chat_completion,
    parse_completion,
)
from tpmodel_worker.api.requests import check_request_id, resolve_request

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024 * 1024
MAX_PROMPTS = 128
REQUEST_ID_HEADER = "x-request-id"
TIMEOUT_HEADER = "x-request-timeout"

T = TypeVar("T")

_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpApi:
    """The handlers. Every request runs through Generation, as those of gRPC do."""

    def __init__(self, model: ServedModel, link: EngineLink, metrics: ApiMetrics) -> None:
        self._model = model
        self._link = link
        self._metrics = metrics
        self._started = int(time.time())

    def app(self) -> ASGIApp:
        """The ASGI application."""
        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _http_exception})
        key = self._model.settings.api_key
        return ApiKeyCheck(app, key) if key else app

    async def health(self, request: Request) -> Response:
        """200 while a request would run now, else 503."""
        return Response(status_code=200 if self._link.serving else 503)

    async def metrics(self, request: Request) -> Response:
        """The metrics of all processes of the pod."""
        body = await asyncio.to_thread(render_all, self._model.settings.metrics_dir)
        return Response(body, media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """The one model, as a list."""
        return JSONResponse({"object": "list", "data": [self._describe()]})

    async def one_model(self, request: Request) -> Response:
        """The model, by its name."""
        try:
            self._check_model(request.path_params["name"])
        except ApiError as error:
            return error_response(error)
        return JSONResponse(self._describe())

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""

        async def prepare(body: bytes, request_id: str) -> tuple[CompletionBody, Sequence[Sequence[int]], ReplyFormat]:
            parsed = parse_completion(body)
            self._check_model(parsed.model)
            prompts = parsed.prompts()
            if not 1 <= len(prompts) <= MAX_PROMPTS:
                raise invalid("prompt", f"{len(prompts)} prompts, accepted: 1 to {MAX_PROMPTS}")
            ids = [
                await self._model.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
                for prompt in prompts
            ]
            return parsed, ids, self._format(CompletionFormat, request_id)

        return await self._serve(request, prepare)

    async def chat_completions(self, request: Request) -> Response:
        """POST /v1/chat/completions."""

        async def prepare(
            body: bytes, request_id: str
        ) -> tuple[ChatCompletionBody, Sequence[Sequence[int]], ReplyFormat]:
            parsed = parse_chat_completion(body)
            self._check_model(parsed.model)
            text = self._model.render_chat(
                [message.for_template() for message in parsed.messages],
                add_generation_prompt=parsed.add_generation_prompt is not False,
                variables=parsed.chat_template_kwargs,
            )
            ids = await self._model.encode(text, add_special_tokens=False)
            return parsed, [ids], self._format(ChatFormat, request_id)

        return await self._serve(request, prepare)

    async def _serve(
        self,
        request: Request,
        prepare: Callable[
            [bytes, str], Awaitable[tuple[CompletionBody | ChatCompletionBody, Sequence[Sequence[int]], ReplyFormat]]
        ],
    ) -> Response:
        """Reads, runs and answers one request; whatever happens, its generations are closed."""
        request_id = ""
        with ExitStack() as stack:
            outcome = stack.enter_context(self._metrics.count_request("http"))
            try:
                request_id = check_request_id(request.headers.get(REQUEST_ID_HEADER, ""))
                deadline = _deadline(request)
                parsed, prompts, form = await prepare(await _read_body(request), request_id)
                proto = parsed.to_generate_request(request_id)
                generations = [
                    Generation(
                        resolve_request(proto, prompt, self._model, deadline=deadline),
                        model=self._model,
                        link=self._link,
                        metrics=self._metrics,
                    )
                    for prompt in prompts
                ]
                for generation in generations:
                    stack.callback(generation.close)
                reply = Reply(generations, form, include_usage=parsed.include_usage)
                events = merge(generations)
                headers = {REQUEST_ID_HEADER: request_id}
                if not parsed.stream:
                    body = await _unless_disconnected(request, reply.whole(events))
                    outcome.code = "OK"
                    return JSONResponse(body, headers=headers)
                # The reply's status depends on whether the request is admitted.
                first = await _unless_disconnected(request, anext(events))
                chunks = _guarded(reply.stream(first, events), outcome, request_id)
                return EventStream(chunks, headers, on_end=stack.pop_all().close)
            except ApiError as error:
                outcome.code = error.code.name
                logger.info("%s: %s", error.code.name, error.message, extra={"request_id": request_id})
                return error_response(error)
            except ClientDisconnect:
                logger.info("the client went away", extra={"request_id": request_id})
                return Response(status_code=499)

    def _format(self, kind: type[ReplyFormat], request_id: str) -> ReplyFormat:
        return kind(
            request_id=request_id,
            created=int(time.time()),
            model=self._model.settings.served_name,
            tokenizer=self._model.tokenizer,
        )

    def _describe(self) -> dict[str, object]:
        return {
            "id": self._model.settings.served_name,
            "object": "model",
            "created": self._started,
            "owned_by": "tpmodel",
            "max_model_len": self._model.limits.max_model_len,
        }

    def _check_model(self, name: str | None) -> None:
        served = self._model.settings.served_name
        if name is not None and name != served:
            message = f"model: {name!r} is not served here, accepted: {served!r}"
            raise ApiError(grpc.StatusCode.NOT_FOUND, message, field="model")


class EventStream(StreamingResponse):
    """Server-sent events; calls on_end when the stream is over, also when the client has gone."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(chunks, headers=headers | {"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


class ApiKeyCheck:
    """Lets only requests with the key reach /v1; compares in constant time."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one ASGI connection."""
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the request lacks the right API key: send it as 'Authorization: Bearer KEY'"
                error = ApiError(grpc.StatusCode.UNAUTHENTICATED, message)
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def error_response(error: ApiError) -> JSONResponse:
    """The error in the shape that OpenAI clients read."""
    status = _HTTP_STATUS.get(error.code, 500)
    headers = {} if error.retry_after is None else {"retry-after": str(math.ceil(error.retry_after))}
    return JSONResponse(_error_body(error, status), status_code=status, headers=headers)


def _error_body(error: ApiError, status: int) -> dict[str, Any]:
    kind = _ERROR_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    detail = {"message": error.message, "type": kind, "param": error.field or None, "code": error.code.name.lower()}
    return {"error": detail}


async def _http_exception(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = str(error.detail) if isinstance(error, HTTPException) else "internal error"
    detail = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": detail}, status_code=status)


async def _guarded(chunks: AsyncIterator[bytes], outcome: RequestOutcome, request_id: str) -> AsyncIterator[bytes]:
    """The chunks; a failure in mid-stream becomes the last event, since the status has been sent."""
    try:
        async for chunk in chunks:
            yield chunk
        outcome.code = "OK"
    except ApiError as error:
        outcome.code = error.code.name
        logger.info("%s: %s", error.code.name, error.message, extra={"request_id": request_id})
        yield sse(_error_body(error, _HTTP_STATUS.get(error.code, 500)))


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise invalid("body", f"more than {MAX_BODY_BYTES} bytes")
    return bytes(body)


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T] | Awaitable[T]) -> T:
    """The result of work, which is cancelled when the client goes away (ClientDisconnect)."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _deadline(request: Request) -> float | None:
    """Unix seconds, from the header with the seconds that the request may take."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise invalid(TIMEOUT_HEADER, f"{text!r} is not a number of seconds above 0")
    return time.time() + seconds
