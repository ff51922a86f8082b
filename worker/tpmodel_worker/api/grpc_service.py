"""InferenceService over gRPC."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from typing import Never

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import inference_pb2, inference_pb2_grpc
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.api.engine_link import EngineLink
from tpmodel_worker.api.errors import RETRY_METADATA, ApiError, invalid
from tpmodel_worker.api.generation import Generation
from tpmodel_worker.api.health import INFERENCE_SERVICE, HealthServicer
from tpmodel_worker.api.metrics import ApiMetrics
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.requests import chat_token_ids, check_token_ids, check_unknown_fields, read_request
from tpmodel_worker.api.tls import ServerCertificate
from tpmodel_worker.auth import Expected, TokenInterceptor

logger = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 * 1024 * 1024
_OPTIONS = (
    ("grpc.so_reuseport", 1),
    # Connections are renewed, so that clients find new gangs; streams on them are never cut (no grace is
    # set, and gRPC's default is to wait for ever).
    ("grpc.max_connection_age_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # A client that vanished without a word is found by these pings.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.ping_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", -1),
)


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Translates between gRPC calls and Generation."""

    def __init__(self, model: ServedModel, link: EngineLink, metrics: ApiMetrics) -> None:
        self._model = model
        self._link = link
        self._metrics = metrics

    async def Generate(  # noqa: N802 - the method's name in the protocol
        self, request: inference_pb2.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        """Streams one request's tokens."""
        with self._metrics.count_request("grpc") as outcome:
            try:
                checked = await read_request(request, self._model, deadline=_deadline(context))
                generation = Generation(checked, model=self._model, link=self._link, metrics=self._metrics)
                # Called however the call ends, also while a write waits for a client that went away.
                context.add_done_callback(lambda _: generation.close())  # pyright: ignore[reportArgumentType]
                async for event in generation.events():
                    yield event
                outcome.code = "OK"
                generation.close()
            except ApiError as error:
                outcome.code = error.code.name
                await _abort(context, error, request.request_id)

    async def Tokenize(  # noqa: N802 - the method's name in the protocol
        self, request: inference_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.TokenizeResponse:
        """Ids of a text or of a conversation's prompt."""
        try:
            check_unknown_fields(request)
            match request.WhichOneof("input"):
                case "text":
                    ids = await self._model.encode(request.text, add_special_tokens=True)
                case "chat":
                    ids = await chat_token_ids(request.chat, self._model)
                case _:
                    raise invalid("input", "one of text and chat is needed")
        except ApiError as error:
            await _abort(context, error)
        return inference_pb2.TokenizeResponse(token_ids=ids)

    async def Detokenize(  # noqa: N802 - the method's name in the protocol
        self, request: inference_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.DetokenizeResponse:
        """Text of ids."""
        try:
            check_unknown_fields(request)
            check_token_ids("token_ids", request.token_ids, self._model.limits.vocab_size)
            tokenizer = self._model.require_tokenizer("Detokenize")
        except ApiError as error:
            await _abort(context, error)
        text = tokenizer.decode(list(request.token_ids), skip_special_tokens=request.skip_special_tokens)
        return inference_pb2.DetokenizeResponse(text=text)

    async def GetModelInfo(  # noqa: N802 - the method's name in the protocol
        self, request: inference_pb2.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetModelInfoResponse:
        """What is served; answers before the world is built, too."""
        model, state = self._model, self._link.state
        return inference_pb2.GetModelInfoResponse(
            model_id=model.settings.model_id,
            served_name=model.settings.served_name,
            model_type=model.config.model_type,
            max_model_len=model.limits.max_model_len,
            vocab_size=model.config.vocab_size,
            world_size=model.settings.world_size,
            dtype=model.settings.dtype or model.config.dtype,
            weight_version=0 if state is None else state.weight_version,
            has_chat_template=model.template is not None,
        )

    async def GetLoad(  # noqa: N802 - the method's name in the protocol
        self, request: inference_pb2.GetLoadRequest, context: grpc.aio.ServicerContext
    ) -> inference_pb2.GetLoadResponse:
        """How busy the gang is; UNAVAILABLE without a world."""
        try:
            state = self._link.check_accepting()
        except ApiError as error:
            await _abort(context, error)
        return inference_pb2.GetLoadResponse(
            running=state.running,
            waiting=state.waiting,
            queue_limit=self._model.settings.queue_limit,
            kv_blocks_total=state.kv_blocks_total,
            kv_blocks_used=state.kv_blocks_used,
        )


def make_grpc_server(
    model: ServedModel, link: EngineLink, metrics: ApiMetrics, certificate: ServerCertificate | None = None
) -> grpc.aio.Server:
    """The server, bound to settings.host:port and not yet started.

    certificate: for TLS; None: plain text.

    Raises:
        RuntimeError: the address cannot be bound.
    """
    settings = model.settings
    interceptors = []
    if settings.api_key:
        # Probes have no key, and health tells nothing about requests.
        expected = Expected.api_key(settings.api_key)
        interceptors.append(TokenInterceptor(expected, open_prefixes=("/grpc.health.v1.Health/",)))
    server = grpc.aio.server(interceptors=interceptors, options=_OPTIONS)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(model, link, metrics), server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(link), server)
    health_service = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((INFERENCE_SERVICE, health_service, reflection.SERVICE_NAME), server)
    address = join_host_port(settings.host, settings.port)
    if certificate is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, certificate.grpc_credentials())
    return server


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    """Unix seconds of the call's deadline."""
    remaining = context.time_remaining()
    return None if remaining is None else time.time() + remaining


async def _abort(context: grpc.aio.ServicerContext, error: ApiError, request_id: str = "") -> Never:
    logger.info("%s: %s", error.code.name, error.message, extra={"request_id": request_id})
    hint = () if error.retry_after is None else ((RETRY_METADATA, str(round(1000 * error.retry_after))),)
    await context.abort(error.code, error.message, hint)
    raise AssertionError("abort() raises")
