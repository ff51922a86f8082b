"""Builds the communicator of one rank for one epoch."""

from __future__ import annotations

import threading

import torch

from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.comm.communicator import Communicator, CommunicatorAbortedError, CommunicatorError
from tpmodel_worker.comm.meeting import Meeting
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.comm.specification import CommunicatorKind, CommunicatorSpec

__all__ = ["CommunicatorSpec", "build_communicator"]


def build_communicator(
    spec: CommunicatorSpec,
    *,
    device: torch.device,
    arenas: ArenaClient | None,
    cancelled: threading.Event | None = None,
) -> Communicator:
    """Joins the world of the spec's epoch; returns once every rank has. All ranks call it at the same time.

    Nothing is left behind when it fails, and the other ranks are told, so that they fail at once too.
    The supervisor keeps this rank's comm arena for the next epoch.

    Args:
        spec: the world.
        device: where the tensors will lie.
        arenas: the link to the supervisor, for comm arenas; None: not for shared_memory.
        cancelled: another thread may set it to end the building; then CommunicatorAbortedError is raised.

    Raises:
        CommunicatorError: the world can't be built; names this rank and what is missing.
        CommunicatorAbortedError: cancelled was set.
    """
    cancelled = cancelled or threading.Event()
    try:
        spec.check()
        kind = spec.resolve_kind(device.type)
        if kind == "single":
            return SingleCommunicator(device)
        return _build(kind, spec, device, arenas, Meeting(spec, cancelled))
    except CommunicatorAbortedError as error:
        raise CommunicatorAbortedError(f"rank {spec.rank}: {error}") from error
    except (CommunicatorError, ArenaError, OSError) as error:
        raise CommunicatorError(f"rank {spec.rank}: {error}") from error


def _build(
    kind: CommunicatorKind, spec: CommunicatorSpec, device: torch.device, arenas: ArenaClient | None, meeting: Meeting
) -> Communicator:
    communicator: Communicator | None = None
    try:
        meeting.wait_for_all("joined")
        communicator = _connect(kind, spec, device, arenas, meeting)
        meeting.wait_for_all("connected")
    except (CommunicatorError, ArenaError, OSError) as error:
        meeting.report_failure(error)
        if communicator is not None:
            communicator.abort("the world could not be built")
            communicator.close()
        raise
    return communicator


def _connect(
    kind: CommunicatorKind, spec: CommunicatorSpec, device: torch.device, arenas: ArenaClient | None, meeting: Meeting
) -> Communicator:
    # Each imports only what its own world needs.
    match kind:
        case "shared_memory":
            from tpmodel_worker.comm.shared_memory import build_shared_memory

            if arenas is None:
                raise CommunicatorError("shared_memory needs the link to the supervisor")
            return build_shared_memory(spec, arenas=arenas, meeting=meeting)
        case "gloo":
            from tpmodel_worker.comm.gloo import build_gloo

            return build_gloo(spec, meeting=meeting, device=device)
        case "nccl":
            from tpmodel_worker.comm.nccl import build_nccl

            return build_nccl(spec, device=device, meeting=meeting)
        case "single":
            return SingleCommunicator(device)
