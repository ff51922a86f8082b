"""What a call can fail with. Every error carries the gRPC status code's name and the server's message."""

from __future__ import annotations

import grpc


class TpmodelError(Exception):
    """A call failed.

    Attributes:
        code: name of the gRPC status code, such as "UNAVAILABLE".
        message: the server's words, which name the field and the remedy.
        retry_after: seconds after which the server thinks that another try is worth it; None: it did not say.
    """

    def __init__(self, code: str, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(f"{message} ({code})")
        self.code = code
        self.message = message
        self.retry_after = retry_after


class InvalidRequestError(TpmodelError):
    """The request cannot be served as it is: the message names the field."""


class OverloadedError(TpmodelError):
    """The server's queue is full, or the client read too slowly: try again later."""


class UnavailableError(TpmodelError):
    """No server answered, or its world is not built."""


class DeadlineExceededError(TpmodelError):
    """The call's timeout passed first."""


class UnsupportedError(TpmodelError):
    """The server does not know the call: it is another one, or older."""


class AuthenticationError(TpmodelError):
    """The API key is missing or wrong."""


class WeightVersionError(TpmodelError):
    """The server's weights are not the ones that made the first part of a resumed stream."""


_RETRY_METADATA = "retry-after-ms"
_ERRORS: dict[grpc.StatusCode, type[TpmodelError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceededError,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedError,
    grpc.StatusCode.UNAUTHENTICATED: AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: AuthenticationError,
    grpc.StatusCode.FAILED_PRECONDITION: WeightVersionError,
}


def error_from(error: grpc.RpcError) -> TpmodelError:
    """The typed error for what gRPC raised."""
    assert isinstance(error, (grpc.Call, grpc.aio.AioRpcError))
    code: grpc.StatusCode = error.code()
    hint = str(dict(error.trailing_metadata() or ()).get(_RETRY_METADATA, ""))
    retry_after = int(hint) / 1000 if hint.isascii() and hint.isdigit() else None
    return _ERRORS.get(code, TpmodelError)(code.name, error.details() or "no details", retry_after=retry_after)
