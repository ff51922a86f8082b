"""The gang's secret token: sent by the engine and the supervisors, checked by every server inside a gang."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

AUTHORIZATION = "authorization"


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that presents the token."""
    return ((AUTHORIZATION, f"Bearer {token}"),)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without the token; compares in constant time."""

    def __init__(self, token: str, *, open_prefixes: tuple[str, ...] = ()) -> None:
        """open_prefixes: method prefixes such as "/grpc.health.v1." that need no token."""
        self._expected = f"Bearer {token}".encode()
        self._open_prefixes = open_prefixes

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Lets the call through, or replaces its handler by one that refuses."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._open_prefixes):
            return handler
        metadata = dict(handler_call_details.invocation_metadata)
        presented = metadata.get(AUTHORIZATION, "")
        given = presented if isinstance(presented, bytes) else presented.encode()
        if hmac.compare_digest(given, self._expected):
            return handler
        return _refusing(handler)


def _refusing(handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call lacks the right bearer token")

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(bool(handler.request_streaming), bool(handler.response_streaming))]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
