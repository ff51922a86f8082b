"""A rank as a member of the trainer's group, and the one thing that it does there at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.background import BackgroundTask, Report
from tpmodel_worker.weights.group import UpdateGroup, join_group
from tpmodel_worker.weights.indexed_group import IndexedGroups
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.ranks import JOIN_STEP
from tpmodel_worker.weights.rehearsal import read_rehearsal


class Membership:
    """Used by the computing thread, but for abort."""

    def __init__(self, *, device: torch.device, address: str, report: Report) -> None:
        """address: IP of this pod, or ""; report: shows a background task's state."""
        self._device = device
        self._address = address
        self._report = report
        self._group: UpdateGroup | None = None
        self._task: BackgroundTask | None = None
        self.cancelled = threading.Event()
        """Set once the group is of no use any more."""
        self.deadline_seconds = 0.0
        """How long one broadcast may take."""

    def join(self, join: pb.JoinUpdate) -> None:
        """Leaves the group before, and begins to join another one. Raises RequestError."""
        member = self._describe(join)
        self.end("the trainer joins anew")
        self.cancelled = cancelled = threading.Event()
        self.deadline_seconds = join.deadline_seconds
        indexed = join.transport == weights_pb2.UPDATE_TRANSPORT_INDEXED

        def job(_task: BackgroundTask) -> None:
            self._group = group = join_group(member, indexed=indexed, key=join.key, cancelled=cancelled)
            if cancelled.is_set():
                group.abort("the joining was cancelled")

        self._task = BackgroundTask(job, self._report, step=JOIN_STEP)

    def start(self, job: Callable[[BackgroundTask], None], *, step: int, total_bytes: int = 0) -> None:
        """Begins a job in the group; group_for says whether one is under way."""
        self._task = BackgroundTask(job, self._report, step=step, total_bytes=total_bytes)

    def group_for(self, step: str) -> Communicator:
        """Where tensors come from, with nothing under way in it. Raises RequestError."""
        if self._task is not None and not self._task.done:
            raise out_of_order(step, "the step before is still under way")
        if self._group is None or self.cancelled.is_set():
            raise out_of_order(step, "the trainer's group is not joined: init comes first")
        return self._group.data if isinstance(self._group, IndexedGroups) else self._group

    @property
    def indexed(self) -> bool:
        """Whether the trainer says before each tensor which one it is."""
        return isinstance(self._group, IndexedGroups)

    @property
    def error(self) -> str:
        """Of the last job; empty: it has none."""
        return self._task.error if self._task is not None else ""

    def abort(self, reason: str) -> None:
        """Releases the background thread from the group. From any thread; idempotent."""
        self.cancelled.set()
        group = self._group
        if group is not None:
            group.abort(reason)

    def end(self, reason: str) -> None:
        """Leaves the group, with nothing under way. Raises RequestError where the thread does not end. Idempotent."""
        self.abort(reason)
        task, self._task = self._task, None
        if task is not None and not task.wait():
            raise RequestError(pb.ERROR_KIND_INTERNAL, "the thread of the weight update does not end")
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _describe(self, join: pb.JoinUpdate) -> GroupMember:
        try:
            rehearsal = read_rehearsal(join.rehearsal) if join.HasField("rehearsal") else None
        except ValueError as error:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error
        return GroupMember(
            master_address=join.master_address,
            master_port=join.master_port,
            rank=join.group_rank,
            size=join.group_size,
            device=self._device,
            address=self._address,
            backend=join.backend,
            timeout_seconds=join.timeout_seconds,
            deadline_seconds=join.deadline_seconds,
            rehearsal=rehearsal,
        )


def out_of_order(step: str, why: str) -> RequestError:
    """A step that is not due."""
    return RequestError(pb.ERROR_KIND_UPDATE_ORDER, f"{step}: {why}")
