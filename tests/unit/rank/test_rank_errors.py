"""Which kind of Error each failure becomes."""

from __future__ import annotations

import errno

import pytest
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.errors import ArenaLinkError, ArenaMemoryError
from tpmodel_worker.comm.communicator import CollectiveArgumentError, CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.models.config import ConfigError
from tpmodel_worker.rank.errors import InvalidPlanError, describe, error_kind
from tpmodel_worker.rank.session import EpochEndedError

KINDS = [
    (InvalidPlanError("slot 4"), pb.ERROR_KIND_INVALID_PLAN),
    (EpochEndedError("over"), pb.ERROR_KIND_ABORTED),
    (CommunicatorAbortedError("over"), pb.ERROR_KIND_ABORTED),
    (CommunicatorError("rank 1 is gone"), pb.ERROR_KIND_COMMUNICATOR),
    (CollectiveArgumentError("expected 2 tensors"), pb.ERROR_KIND_INVALID_ARGUMENT),
    (ConfigError("model_type"), pb.ERROR_KIND_UNSUPPORTED_MODEL),
    (CheckpointError("missing"), pb.ERROR_KIND_BAD_CHECKPOINT),
    (ArenaMemoryError("kv", needed_bytes=2, free_bytes=1), pb.ERROR_KIND_OUT_OF_MEMORY),
    (MemoryError(), pb.ERROR_KIND_OUT_OF_MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory"), pb.ERROR_KIND_OUT_OF_MEMORY),
    (OSError(errno.ENOMEM, "mmap"), pb.ERROR_KIND_OUT_OF_MEMORY),
    (torch.AcceleratorError("illegal memory access"), pb.ERROR_KIND_DEVICE_POISONED),
    (TimeoutError("late"), pb.ERROR_KIND_DEADLINE),
    (ArenaLinkError("gone"), pb.ERROR_KIND_INTERNAL),
    (ZeroDivisionError("a bug"), pb.ERROR_KIND_INTERNAL),
]


@pytest.mark.parametrize(("error", "kind"), KINDS, ids=lambda value: type(value).__name__)
def test_a_failure_has_its_kind(error: Exception, kind: int) -> None:
    assert error_kind(error) == kind


def test_a_failed_allocation_on_the_cpu_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert error_kind(caught.value) == pb.ERROR_KIND_OUT_OF_MEMORY


def test_the_message_names_the_causes() -> None:
    """P12"""
    error = CommunicatorError("rank 1: the world could not be built")
    error.__cause__ = ConnectionResetError("the store is gone")
    assert describe(error).message == "rank 1: the world could not be built: the store is gone"


def test_an_error_without_text_is_named() -> None:
    assert describe(MemoryError()).message == "MemoryError"
