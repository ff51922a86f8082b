"""How a call of a live weight update is refused or fails."""

from __future__ import annotations

import grpc

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import PoolError


class UpdateError(Exception):
    """A call that is refused or has failed; code is a grpc.StatusCode."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def failure_of(error: PoolError) -> UpdateError:
    """What the trainer is told of an error of the ranks."""
    kinds = error.kinds
    if kinds and kinds <= {worker_pb2.ERROR_KIND_INVALID_ARGUMENT}:
        return UpdateError(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if worker_pb2.ERROR_KIND_OUT_OF_MEMORY in kinds:
        return UpdateError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    if kinds and kinds <= {worker_pb2.ERROR_KIND_UPDATE_ORDER}:
        return UpdateError(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    return UpdateError(grpc.StatusCode.ABORTED, str(error))
