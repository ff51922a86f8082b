"""A rank's part of a live weight update: the steps in their order, and what each leaves behind.

In place, the arena in use is overwritten: its manifest says `updating` from before the first byte to the
commit, and nothing may run on it meanwhile (the engine sees to that, `whole` tells). In shadow, a second arena
is filled while the first is in use; the commit exchanges them.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
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
from tpmodel_worker.loading.plan import ArenaPlan, bind_parameters, plan_weights
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.background import BackgroundTask, Report
from tpmodel_worker.weights.broadcast import Broadcaster, Progress
from tpmodel_worker.weights.indexed import RETRY_SECONDS, IndexedReceiver, TrainerStoppedError
from tpmodel_worker.weights.membership import Membership, out_of_order
from tpmodel_worker.weights.packing import TensorInfo, read_update
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.target import WeightTarget, check_tensors, describe_parameters, missing_tensors

_Receiving = Callable[[Callable[[str, torch.Tensor], None], Progress], None]

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


class _Awaited:
    """A receiver that has the first index of a set, and what it was made for."""

    def __init__(self, tensors: weights_pb2.UpdateRequest, receiver: IndexedReceiver) -> None:
        self.tensors = tensors
        self.receiver = receiver


class WeightUpdates:
    """Used by the computing thread, but for abort_group."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        arenas: ArenaClient,
        shard: Shard,
        address: str,
        report: Report,
        persister: Persister,
    ) -> None:
        """address: IP of this pod, or ""; report: shows a background task's state.

        persister: keeps what is committed in files.
        """
        self._rank = rank
        self._device = device
        self._arenas = arenas
        self._shard = shard
        self._member = Membership(device=device, address=address, report=report)
        self._persister = persister
        self._awaited: _Awaited | None = None
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
        ok = pb.WeightUpdateOk()
        if request.HasField("find_persisted"):
            self._find_persisted(request.find_persisted.folder, ok)
            return ok
        loaded = self._loaded()
        match request.WhichOneof("step"):
            case "describe":
                ok.parameters.extend(describe_parameters(plan_weights(loaded.model)))
            case "join":
                self._join(request.join)
            case "begin":
                self._begin(loaded, shadow=request.begin.shadow)
            case "check":
                self._check(request.check)
            case "await_index":
                self._await_index(request.await_index)
            case "receive":
                self._receive(loaded, request.receive)
            case "prepare":
                ok.digest = self._prepare()
            case "commit":
                self._commit(loaded, request.commit.version)
            case "prune_persisted":
                self._persister.prune(request.prune_persisted.keep)
            case "abort":
                self._abort(request.abort.reason)
            case "find_persisted" | None:
                raise RequestError(pb.ERROR_KIND_UNKNOWN_OP, "the weight update has no step that this rank knows")
        version = self._loaded().weight_version
        if version is not None:
            ok.weight_version = version
        return ok

    def keep(self, folder: str) -> None:
        """A model was loaded: what it is made of is kept in the folder ("": nowhere), where it is no checkpoint."""
        self._persister.choose(folder)
        loaded = self._shard.loaded
        if loaded is not None and loaded.weight_version:
            self._persister.keep(loaded.arena, self._manifest(loaded))

    def unload(self) -> None:
        """The model is about to be dropped, and with it whatever is under way."""
        self._persister.cancel()
        self.leave("the model is unloaded")

    def abort_group(self, reason: str) -> None:
        """Releases the background thread from the trainer's group. From any thread; idempotent."""
        self._member.abort(reason)

    def leave(self, reason: str) -> None:
        """The epoch ends, and with it the group and whatever was under way."""
        try:
            self._member.end(reason)
        except RequestError:
            # The supervisor's deadline for leaving an epoch ends the process.
            _logger.exception("the weight update holds up the end of the epoch")
        self._update = None

    # ------------------------------------------------------------------------------------ the steps

    def _join(self, join: pb.JoinUpdate) -> None:
        if self._update is not None:
            raise out_of_order("join", "an update is under way: finish or abort it first")
        self._awaited = None
        self._member.join(join)

    def _await_index(self, request: pb.AwaitIndex) -> None:
        """Waits for the trainer's first index; the receiving goes on with the same receiver."""
        group = self._member.group_for("await_index")
        if not self._member.indexed:
            raise out_of_order("await_index", "the group was not joined for transport indexed")
        tensors = self._check_indexed(self._target_plan(), request.tensors)
        member = self._member
        receiver = IndexedReceiver(group, tensors, cancelled=member.cancelled, retry_seconds=RETRY_SECONDS)
        self._awaited = _Awaited(request.tensors, receiver)

        def job(task: BackgroundTask) -> None:
            try:
                receiver.wait(task.progress)
            except TrainerStoppedError as error:
                task.stopped = str(error)

        member.start(job, step=request.step)

    def _begin(self, loaded: LoadedModel, *, shadow: bool) -> None:
        self._member.group_for("begin")
        if self._update is not None:
            raise out_of_order("begin", "an update is under way: finish or abort it first")
        plan = plan_weights(loaded.model)
        arena = loaded.arena
        if shadow:
            if not self.whole:
                raise out_of_order("begin", "the weights are incomplete: only an update in place can heal them")
            arena = Arena.create(ArenaId(self._rank, "weights", 1), plan.size, self._device)
            if self._device.type == "cuda":
                arena.bytes.zero_()  # padding rows have to be zero, as new host memory is
        self._update = _Update(WeightTarget(plan, arena), shadow=shadow)

    def _check(self, request: weights_pb2.UpdateRequest) -> None:
        update = self._update_for("check")
        if request.indexed != self._member.indexed:
            raise RequestError(
                pb.ERROR_KIND_INVALID_ARGUMENT,
                f"indexed is {request.indexed}, the group was joined for the other transport",
            )
        if request.indexed:
            self._check_indexed(update.target.plan, request)
        else:
            _check_names(update.target.plan, request)
        update.checked = request

    def _check_indexed(self, plan: ArenaPlan, request: weights_pb2.UpdateRequest) -> list[TensorInfo]:
        """U30: the same set in the same order as this rank would name it."""
        tensors = _check_names(plan, request)
        if [tensor.name for tensor in tensors] != sorted(plan.shapes):
            raise RequestError(
                pb.ERROR_KIND_INVALID_ARGUMENT,
                f"{len(tensors)} names: transport indexed needs all {len(plan.shapes)} that are not tied, in order",
            )
        return tensors

    def _receive(self, loaded: LoadedModel, receive: pb.ReceiveWeights) -> None:
        group = self._member.group_for("receive")
        update = self._update_for("receive")
        if update.checked != receive.update:
            raise out_of_order("receive", "these tensors were not checked before")
        update.checked, update.digests = None, None
        tensors = read_update(receive.update)
        if receive.update.indexed:
            total, receiving = self._indexed_receiving(group, tensors, receive.update)
        else:
            total, receiving = self._ordered_receiving(group, tensors, receive.update)
        if not update.shadow:
            self._mark_updating(loaded, update.target)

        def job(task: BackgroundTask) -> None:
            try:
                receiving(update.target.load, task.progress)
            except TrainerStoppedError as error:
                task.stopped = str(error)
                raise
            update.received |= {tensor.name for tensor in tensors}

        self._member.start(job, step=receive.step, total_bytes=total)

    def _ordered_receiving(
        self, group: Communicator, tensors: Sequence[TensorInfo], request: weights_pb2.UpdateRequest
    ) -> tuple[int, _Receiving]:
        broadcaster = Broadcaster(
            group,
            tensors,
            buffer_size=request.buffer_size if request.packed else 0,
            buffer_count=request.buffer_count if request.packed else 1,
        )
        deadline = self._member.deadline_seconds
        return broadcaster.total_bytes, lambda load, progress: broadcaster.receive(load, progress, deadline)

    def _indexed_receiving(
        self, group: Communicator, tensors: Sequence[TensorInfo], request: weights_pb2.UpdateRequest
    ) -> tuple[int, _Receiving]:
        awaited, self._awaited = self._awaited, None
        if awaited is not None and awaited.tensors.names == request.names and awaited.tensors.dtypes == request.dtypes:
            receiver = awaited.receiver
        else:
            member = self._member
            receiver = IndexedReceiver(group, tensors, cancelled=member.cancelled, retry_seconds=RETRY_SECONDS)
        return sum(tensor.bytes for tensor in tensors), receiver.receive

    def _prepare(self) -> int:
        update = self._update_for("prepare")
        missing = missing_tensors(update.target.plan, update.received)
        if missing:
            raise out_of_order("prepare", f"{len(missing)} tensors of the set have not come, the first is {missing[0]}")
        update.digests = digest_tensors(update.target.plan, update.target.arena, lambda *_: None)
        return sum(update.digests.values()) % (1 << 64)

    def _commit(self, loaded: LoadedModel, version: int) -> None:
        update = self._update_for("commit")
        digests = update.digests
        if digests is None:
            raise out_of_order("commit", "the set was not prepared")
        manifest, arena = self._manifest(loaded), update.target.arena
        self._persister.cancel()
        if update.shadow:
            arena.id = loaded.arena.id
        committed = completed_manifest(manifest, arena, digests, version=version)
        if update.shadow:
            self._arenas.store(arena, committed)
        else:
            self._arenas.update_manifest(committed)
        self._update = None
        before = loaded.arena
        self._shard.replace_weights(arena=arena, digest=sum(digests.values()) % (1 << 64), version=version)
        if update.shadow:
            bind_parameters(loaded.model, update.target.plan, arena)
            # The old parameters were views of it.
            gc.collect()
            before.close()
        self._persister.keep(arena, committed)

    def _abort(self, reason: str) -> None:
        self._member.end(reason or "the update was aborted")
        update, self._update = self._update, None
        if update is not None and update.shadow:
            update.target.arena.close()

    # ---------------------------------------------------------------------------------------- parts

    def _mark_updating(self, loaded: LoadedModel, target: WeightTarget) -> None:
        self._persister.cancel()
        if loaded.weight_version is None:
            return
        manifest = self._manifest(loaded)
        manifest.state = pb.ARENA_STATE_UPDATING
        self._arenas.update_manifest(manifest)
        self._shard.replace_weights(arena=target.arena, digest=0, version=None)

    def _find_persisted(self, folder: str, ok: pb.WeightUpdateOk) -> None:
        files = self._persister.choose(folder)
        ok.persisted_versions.extend(files.versions() if files is not None else ())
        loaded = self._shard.loaded
        if loaded is not None:
            held = loaded.weight_version
        else:
            manifest = self._held_manifest(ArenaId(self._rank, "weights", 0))
            complete = manifest is not None and manifest.state == pb.ARENA_STATE_COMPLETE
            held = manifest.weight_version if manifest is not None and complete else None
        if held is not None:
            ok.held_version = held

    def _held_manifest(self, arena_id: ArenaId) -> pb.ArenaManifest | None:
        held = self._arenas.fetch(arena_id)
        if held is None:
            return None
        descriptor, manifest = held
        os.close(descriptor)
        return manifest

    def _manifest(self, loaded: LoadedModel) -> pb.ArenaManifest:
        manifest = self._held_manifest(loaded.arena.id)
        if manifest is None:
            raise ArenaError(f"{loaded.arena.id} is not held by the supervisor any more")
        return manifest

    def _loaded(self) -> LoadedModel:
        loaded = self._shard.loaded
        if loaded is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "no model is loaded: LoadDenseShard comes first")
        return loaded

    def _target_plan(self) -> ArenaPlan:
        return plan_weights(self._loaded().model)

    def _update_for(self, step: str) -> _Update:
        self._member.group_for(step)
        if self._update is None:
            raise out_of_order(step, "no update was started")
        if self._member.error:
            raise out_of_order(step, f"the step before failed: {self._member.error}")
        return self._update


def _check_names(plan: ArenaPlan, request: weights_pb2.UpdateRequest) -> list[TensorInfo]:
    try:
        tensors = read_update(request)
        check_tensors(plan, tensors)
    except ValueError as error:
        raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error
    return tensors
