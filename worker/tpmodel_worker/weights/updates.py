"""A rank's part of a live weight update: the steps in their order, and what each leaves behind.

In place, the arena in use is overwritten: its manifest says `updating` from before the first byte to the
commit, and nothing may run on it meanwhile (the engine sees to that, `whole` tells). In shadow, a second arena
is filled while the first is in use; the commit exchanges them.
"""

from __future__ import annotations

import gc
import logging
import os
import threading
from typing import Protocol

import torch

from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.loading.load import LoadedModel, completed_manifest, digest_tensors
from tpmodel_worker.loading.plan import bind_parameters, plan_weights
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.background import BackgroundTask, Report
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.packing import read_update
from tpmodel_worker.weights.target import WeightTarget, check_tensors, describe_parameters, missing_tensors

_JOIN_STEP = 0

_logger = logging.getLogger(__name__)


class Shard(Protocol):
    """Where the model of this rank is."""

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if there is one."""
        ...

    def replace_weights(self, *, arena: Arena, digest: int, version: int | None) -> None:
        """Notes which arena holds the model's weights now, and what they are."""
        ...


class _Update:
    """What begins with begin and ends with commit or abort."""

    def __init__(self, target: WeightTarget, *, shadow: bool) -> None:
        self.target = target
        self.shadow = shadow
        self.checked: weights_pb2.UpdateRequest | None = None
        self.received: set[str] = set()
        self.digests: dict[str, int] | None = None


class WeightUpdates:
    """Used by the computing thread, but for abort_group."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        arenas: ArenaClient,
        shard: Shard,
        token: str,
        address: str,
        report: Report,
    ) -> None:
        """token: the gang's; address: IP of this pod, or ""; report: shows a background task's state."""
        self._rank = rank
        self._device = device
        self._arenas = arenas
        self._shard = shard
        self._token = token
        self._address = address
        self._report = report
        self._group: Communicator | None = None
        self._cancelled = threading.Event()
        self._deadline_seconds = 0.0
        self._task: BackgroundTask | None = None
        self._update: _Update | None = None

    @property
    def whole(self) -> bool:
        """Whether the model may run on its weights."""
        loaded = self._shard.loaded
        return loaded is None or loaded.weight_version is not None

    def execute(self, request: pb.WeightUpdateRequest) -> pb.WeightUpdateOk:
        """Takes one step.

        Raises:
            RequestError: the step is not due, or what it says does not fit the model.
            ArenaError: there is no memory for a second arena (both numbers are named), or the supervisor refused.
        """
        loaded = self._loaded()
        ok = pb.WeightUpdateOk()
        match request.WhichOneof("step"):
            case "describe":
                ok.parameters.extend(describe_parameters(plan_weights(loaded.model)))
            case "join":
                self._join(request.join)
            case "begin":
                self._begin(loaded, shadow=request.begin.shadow)
            case "check":
                self._check(request.check)
            case "receive":
                self._receive(loaded, request.receive)
            case "prepare":
                ok.digest = self._prepare()
            case "commit":
                self._commit(loaded, request.commit.version)
            case "abort":
                self._abort(request.abort.reason)
            case None:
                raise RequestError(pb.ERROR_KIND_UNKNOWN_OP, "the weight update has no step that this rank knows")
        version = self._loaded().weight_version
        if version is not None:
            ok.weight_version = version
        return ok

    def abort_group(self, reason: str) -> None:
        """Releases the background thread from the trainer's group. From any thread; idempotent."""
        self._cancelled.set()
        group = self._group
        if group is not None:
            group.abort(reason)

    def leave(self, reason: str) -> None:
        """The epoch ends, and with it the group and whatever was under way."""
        try:
            self._end_group(reason)
        except RequestError:
            # The supervisor's deadline for leaving an epoch ends the process.
            _logger.exception("the weight update holds up the end of the epoch")
        self._update = None

    # ------------------------------------------------------------------------------------ the steps

    def _join(self, join: pb.JoinUpdate) -> None:
        if self._update is not None:
            raise _out_of_order("join", "an update is under way: finish or abort it first")
        self._end_group("the trainer joins anew")
        self._cancelled = cancelled = threading.Event()
        self._deadline_seconds = join.deadline_seconds

        def job(_task: BackgroundTask) -> None:
            self._group = join_update_group(
                master_address=join.master_address,
                master_port=join.master_port,
                rank=join.group_rank,
                size=join.group_size,
                device=self._device,
                token=self._token,
                address=self._address,
                timeout_seconds=join.timeout_seconds,
                deadline_seconds=join.deadline_seconds,
                cancelled=cancelled,
            )
            if cancelled.is_set():
                self._group.abort("the joining was cancelled")

        self._task = BackgroundTask(job, self._report, step=_JOIN_STEP)

    def _begin(self, loaded: LoadedModel, *, shadow: bool) -> None:
        self._group_for("begin")
        if self._update is not None:
            raise _out_of_order("begin", "an update is under way: finish or abort it first")
        plan = plan_weights(loaded.model)
        arena = loaded.arena
        if shadow:
            if not self.whole:
                raise _out_of_order("begin", "the weights are incomplete: only an update in place can heal them")
            arena = Arena.create(ArenaId(self._rank, "weights", 1), plan.size, self._device)
            if self._device.type == "cuda":
                arena.bytes.zero_()  # padding rows have to be zero, as new host memory is
        self._update = _Update(WeightTarget(plan, arena), shadow=shadow)

    def _check(self, request: weights_pb2.UpdateRequest) -> None:
        update = self._update_for("check")
        try:
            check_tensors(update.target.plan, read_update(request))
        except ValueError as error:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error
        update.checked = request

    def _receive(self, loaded: LoadedModel, receive: pb.ReceiveWeights) -> None:
        group = self._group_for("receive")
        update = self._update_for("receive")
        if update.checked != receive.update:
            raise _out_of_order("receive", "these tensors were not checked before")
        update.checked, update.digests = None, None
        tensors = read_update(receive.update)
        packed = receive.update.packed
        broadcaster = Broadcaster(
            group,
            tensors,
            buffer_size=receive.update.buffer_size if packed else 0,
            buffer_count=receive.update.buffer_count if packed else 1,
        )
        if not update.shadow:
            self._mark_updating(loaded, update.target)

        def job(task: BackgroundTask) -> None:
            broadcaster.receive(update.target.load, task.progress, self._deadline_seconds)
            update.received |= {tensor.name for tensor in tensors}

        self._task = BackgroundTask(job, self._report, step=receive.step, total_bytes=broadcaster.total_bytes)

    def _prepare(self) -> int:
        update = self._update_for("prepare")
        missing = missing_tensors(update.target.plan, update.received)
        if missing:
            raise _out_of_order(
                "prepare", f"{len(missing)} tensors of the set have not come, the first is {missing[0]}"
            )
        update.digests = digest_tensors(update.target.plan, update.target.arena, lambda *_: None)
        return sum(update.digests.values()) % (1 << 64)

    def _commit(self, loaded: LoadedModel, version: int) -> None:
        update = self._update_for("commit")
        digests = update.digests
        if digests is None:
            raise _out_of_order("commit", "the set was not prepared")
        manifest, arena = self._manifest(loaded), update.target.arena
        if update.shadow:
            arena.id = loaded.arena.id
            self._arenas.store(arena, completed_manifest(manifest, arena, digests, version=version))
        else:
            self._arenas.update_manifest(completed_manifest(manifest, arena, digests, version=version))
        self._update = None
        before = loaded.arena
        self._shard.replace_weights(arena=arena, digest=sum(digests.values()) % (1 << 64), version=version)
        if update.shadow:
            bind_parameters(loaded.model, update.target.plan, arena)
            # The old parameters were views of it.
            gc.collect()
            before.close()

    def _abort(self, reason: str) -> None:
        self._end_group(reason or "the update was aborted")
        update, self._update = self._update, None
        if update is not None and update.shadow:
            update.target.arena.close()

    # ---------------------------------------------------------------------------------------- parts

    def _mark_updating(self, loaded: LoadedModel, target: WeightTarget) -> None:
        if loaded.weight_version is None:
            return
        manifest = self._manifest(loaded)
        manifest.state = pb.ARENA_STATE_UPDATING
        self._arenas.update_manifest(manifest)
        self._shard.replace_weights(arena=target.arena, digest=0, version=None)

    def _manifest(self, loaded: LoadedModel) -> pb.ArenaManifest:
        held = self._arenas.fetch(loaded.arena.id)
        if held is None:
            raise ArenaError(f"{loaded.arena.id} is not held by the supervisor any more")
        descriptor, manifest = held
        os.close(descriptor)
        return manifest

    def _loaded(self) -> LoadedModel:
        loaded = self._shard.loaded
        if loaded is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "no model is loaded: LoadDenseShard comes first")
        return loaded

    def _group_for(self, step: str) -> Communicator:
        """The group, with nothing under way in it."""
        if self._task is not None and not self._task.done:
            raise _out_of_order(step, "the step before is still under way")
        if self._group is None or self._cancelled.is_set():
            raise _out_of_order(step, "the trainer's group is not joined: init comes first")
        return self._group

    def _update_for(self, step: str) -> _Update:
        self._group_for(step)
        if self._update is None:
            raise _out_of_order(step, "no update was started")
        if self._task is not None and self._task.error:
            raise _out_of_order(step, f"the step before failed: {self._task.error}")
        return self._update

    def _end_group(self, reason: str) -> None:
        self.abort_group(reason)
        task, self._task = self._task, None
        if task is not None and not task.wait():
            raise RequestError(pb.ERROR_KIND_INTERNAL, "the thread of the weight update does not end")
        group, self._group = self._group, None
        if group is not None:
            group.close()


def _out_of_order(step: str, why: str) -> RequestError:
    return RequestError(pb.ERROR_KIND_UPDATE_ORDER, f"{step}: {why}")
