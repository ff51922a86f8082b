"""The one error that a request can end with, whatever protocol brought it."""

from __future__ import annotations

import grpc

_BY_NUMBER = {code.value[0]: code for code in grpc.StatusCode}


class ApiError(Exception):
    """A refusal or failure of a request: a gRPC status code, and a message that names field and remedy."""

    def __init__(self, code: grpc.StatusCode, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        """Request field at fault, as GenerateRequest or SamplingParams spells it; may be empty."""

    @classmethod
    def from_number(cls, code: int, message: str) -> ApiError:
        """From a google.rpc.Code; a number that is none counts as UNKNOWN."""
        return cls(_BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN), message)


def invalid(field: str, problem: str) -> ApiError:
    """INVALID_ARGUMENT about one field."""
    return ApiError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}", field=field)


def out_of_range(field: str, value: object, accepted: str) -> ApiError:
    """INVALID_ARGUMENT that names field, value and the accepted range."""
    return invalid(field, f"{value!r} is out of range, accepted: {accepted}")


def unavailable(message: str) -> ApiError:
    """UNAVAILABLE: the same request may work a moment later, or on another gang."""
    return ApiError(grpc.StatusCode.UNAVAILABLE, message)
