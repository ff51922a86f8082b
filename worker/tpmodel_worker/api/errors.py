"""The one error that a request can end with, whatever protocol brought it."""

from __future__ import annotations

import grpc

from tpmodel.v1 import pod_pb2

RETRY_METADATA = "retry-after-ms"
"""Trailing metadata of a gRPC error that another try may not meet again."""

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class ApiError(Exception):
    """A refusal or failure of a request: a gRPC status code, and a message that names field and remedy."""

    def __init__(
        self, code: grpc.StatusCode, message: str, *, field: str = "", retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry_after = retry_after
        """Seconds after which another try is worth it; None: nothing is known of that."""
        self.field = field
        """Request field at fault, as GenerateRequest or SamplingParams spells it; may be empty."""

    @classmethod
    def from_engine(cls, error: pod_pb2.RequestError) -> ApiError:
        """What the engine failed a request with; a code that is no google.rpc.Code counts as UNKNOWN."""
        code = _BY_NUMBER.get(error.code, grpc.StatusCode.UNKNOWN)
        return cls(code, error.message, retry_after=error.retry_after_ms / 1000 or None)


def invalid(field: str, problem: str) -> ApiError:
    """INVALID_ARGUMENT about one field."""
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}", field=field)


def out_of_range(field: str, value: object, accepted: str) -> ApiError:
    """INVALID_ARGUMENT that names field, value and the accepted range."""
    return invalid(field, f"{value!r} is out of range, accepted: {accepted}")


def unavailable(message: str) -> ApiError:
    """UNAVAILABLE: the same request may work a moment later, or on another gang."""
    return ApiError(grpc.StatusCode.UNAVAILABLE, message)
