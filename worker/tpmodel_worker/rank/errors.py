"""How a failure of a request becomes the Error that answers it."""

from __future__ import annotations

import errno

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.errors import ArenaMemoryError
from tpmodel_worker.comm.communicator import CollectiveArgumentError, CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.persisted import PersistedWeightsError
from tpmodel_worker.models.config import ConfigError
from tpmodel_worker.rank.session import EpochEndedError

# torch reports a failed allocation on the CPU as a plain RuntimeError with this in its text.
_CPU_ALLOCATION_FAILED = "can't allocate memory"


# The first that matches.
_KINDS: tuple[tuple[type[BaseException], pb.ErrorKind.ValueType], ...] = (
    (EpochEndedError, pb.ERROR_KIND_ABORTED),
    (CommunicatorAbortedError, pb.ERROR_KIND_ABORTED),
    (CommunicatorError, pb.ERROR_KIND_COMMUNICATOR),
    (CollectiveArgumentError, pb.ERROR_KIND_INVALID_ARGUMENT),
    (ConfigError, pb.ERROR_KIND_UNSUPPORTED_MODEL),
    (CheckpointError, pb.ERROR_KIND_BAD_CHECKPOINT),
    (PersistedWeightsError, pb.ERROR_KIND_BAD_PERSISTED_WEIGHTS),
    # A CUDA error: no call in this process will succeed any more.
    (torch.AcceleratorError, pb.ERROR_KIND_DEVICE_POISONED),
    (TimeoutError, pb.ERROR_KIND_DEADLINE),
)


class RequestError(Exception):
    """A request cannot be executed; carries the kind that the engine is told."""

    def __init__(self, kind: pb.ErrorKind.ValueType, message: str) -> None:
        super().__init__(message)
        self.kind: pb.ErrorKind.ValueType = kind


class InvalidPlanError(RequestError):
    """A plan was refused from its content alone, before anything was touched."""

    def __init__(self, message: str) -> None:
        super().__init__(pb.ERROR_KIND_INVALID_PLAN, message)


def describe(error: Exception) -> pb.Error:
    """The Error message for a failure: its kind, and its text with the text of its causes."""
    texts: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause) or type(cause).__name__
        if not texts or text not in texts[-1]:
            texts.append(text)
        cause = cause.__cause__
    return pb.Error(kind=error_kind(error), message=": ".join(texts))


def error_kind(error: BaseException) -> pb.ErrorKind.ValueType:
    """The kind of a failure; one that no rule below knows is internal."""
    if isinstance(error, RequestError):
        return error.kind
    if _is_out_of_memory(error):
        return pb.ERROR_KIND_OUT_OF_MEMORY
    for exception_type, kind in _KINDS:
        if isinstance(error, exception_type):
            return kind
    return pb.ERROR_KIND_INTERNAL


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError, ArenaMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno in (errno.ENOMEM, errno.ENOSPC)
    return isinstance(error, RuntimeError) and _CPU_ALLOCATION_FAILED in str(error)
