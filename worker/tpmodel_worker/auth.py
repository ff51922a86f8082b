"""Bearer tokens: what calls present, and the check of every server.

Each service takes one token and no other: the gang's own inside the gang, the trainer's for weight updates, the API
key of clients. Nobody who has one of them can do what another is for.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import grpc

from tpmodel.token_files import TokenFileError, read_token

AUTHORIZATION = "authorization"
_SCHEME = "Bearer "
_NO_TRAINERS = (
    "this gang takes no weight updates: name the file of its trainer's token, --trainer-token-file (in Kubernetes: a "
    "Secret, auth.trainerToken)"
)

logger = logging.getLogger(__name__)


class NoTokenError(Exception):
    """No token would be right at present; the message says why."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What calls of a service have to present."""

    name: str
    """As it is called in a refusal."""
    read: Callable[[], Awaitable[str]]
    """Raises NoTokenError."""

    @classmethod
    def gang_token(cls, token: str) -> Expected:
        """Of the services through which the processes of a gang command each other."""
        return cls("the gang's own token", _fixed(token))

    @classmethod
    def api_key(cls, key: str) -> Expected:
        """Of the services for clients."""
        return cls("the API key", _fixed(key))

    @classmethod
    def trainer_token(cls, file: str) -> Expected:
        """Of weight updates.

        file: read again for every call, since a Secret that is changed changes the file; "": there are no trainers.
        """

        async def read() -> str:
            if not file:
                raise NoTokenError(_NO_TRAINERS)
            try:
                return await asyncio.to_thread(read_token, file)
            except TokenFileError as error:
                logger.error("no trainer is let in: --trainer-token-file %s", error)
                raise NoTokenError("the gang cannot read its trainer's token: its log says why") from error

        return cls("the trainer's token (--trainer-token-file, in Kubernetes auth.trainerToken)", read)


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Call metadata that presents the token."""
    return ((AUTHORIZATION, f"{_SCHEME}{token}"),)


def presented_token(context: grpc.aio.ServicerContext) -> str:
    """What a call that was let in has presented."""
    metadata: dict[str, Any] = dict(context.invocation_metadata() or ())
    return str(metadata.get(AUTHORIZATION, "")).removeprefix(_SCHEME)


def update_group_key(trainer_token: str, master_address: str, master_port: int) -> str:
    """What the members of one group of a trainer prove to know: ranks never see the trainer's token itself.

    It is of no use for a group with another store.
    """
    message = f"tpmodel\nweight update\n{master_address}\n{master_port}".encode()
    return hmac.new(trainer_token.encode(), message, hashlib.sha256).hexdigest()


def weight_copy_key(trainer_token: str, nonce: str) -> str:
    """What the ranks of two gangs prove to know, one of which copies the other's weights.

    nonce: drawn anew for each copy by the gang that asks for it.
    """
    return hmac.new(trainer_token.encode(), f"tpmodel\nweight copy\n{nonce}".encode(), hashlib.sha256).hexdigest()


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Answers UNAUTHENTICATED to calls without the token that their service takes; compares in constant time."""

    def __init__(
        self,
        expected: Expected,
        *,
        open_prefixes: tuple[str, ...] = (),
        services: Mapping[str, Expected] = MappingProxyType({}),
    ) -> None:
        """Does nothing yet.

        Args:
            expected: by all services that are not named.
            open_prefixes: method prefixes such as "/grpc.health.v1." that need no token.
            services: full names of services that take another token, and which.
        """
        self._expected = expected
        self._open_prefixes = open_prefixes
        self._services = services

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """Lets the call through, or replaces its handler by one that refuses."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(self._open_prefixes):
            return handler
        service = handler_call_details.method[1:].rpartition("/")[0]
        expected = self._services.get(service, self._expected)
        try:
            token = await expected.read()
        except NoTokenError as error:
            return _refusing(handler, grpc.StatusCode.PERMISSION_DENIED, str(error))
        metadata = dict(handler_call_details.invocation_metadata)
        presented = metadata.get(AUTHORIZATION, "")
        given = presented if isinstance(presented, bytes) else presented.encode()
        if hmac.compare_digest(given, f"{_SCHEME}{token}".encode()):
            return handler
        wrong = "presents another one" if given else "presents none"
        message = f"{service} takes {expected.name} as bearer token, and this call {wrong}"
        return _refusing(handler, grpc.StatusCode.UNAUTHENTICATED, message)


def _fixed(token: str) -> Callable[[], Awaitable[str]]:
    async def read() -> str:
        return token

    return read


def _refusing(
    handler: grpc.RpcMethodHandler[Any, Any], code: grpc.StatusCode, message: str
) -> grpc.RpcMethodHandler[Any, Any]:
    async def refuse(_request: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(code, message)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[(bool(handler.request_streaming), bool(handler.response_streaming))]
    return make(refuse, handler.request_deserializer, handler.response_serializer)
