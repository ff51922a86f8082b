"""A rank's part of a live weight update: the steps in their order, and what each leaves behind.

In place, the arena in use is overwritten: its manifest says `updating` from before the first byte to the
commit, and nothing may run on it meanwhile (the engine sees to that, `whole` tells). In shadow, a second arena
is filled while the first is in use. Once it is whole the supervisor holds both (see held.py); the commit exchanges
them in the model.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.digest import shard_digest
from tpmodel_worker.loading.load import LoadedModel, digest_tensors
from tpmodel_worker.loading.plan import ArenaPlan, plan_weights
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.background import BackgroundTask, Report
from tpmodel_worker.weights.held import HeldWeights, Shard
from tpmodel_worker.weights.indexed import TrainerStoppedError
from tpmodel_worker.weights.membership import Membership, out_of_order
from tpmodel_worker.weights.packing import TensorInfo, read_update
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.receiving import Receivers
from tpmodel_worker.weights.target import WeightTarget, check_tensors, describe_parameters, missing_tensors

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A full set, by tensor, and the version that it is to have."""

    digests: dict[str, int]
    version: int


class _Update:
    """What begins with begin and ends with commit or abort."""

    def __init__(self, target: WeightTarget, *, shadow: bool) -> None:
        self.target = target
        self.shadow = shadow
        self.checked: weights_pb2.UpdateRequest | None = None
        self.received: set[str] = set()
        self.prepared: _Prepared | None = None


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
        self._device = device
        self._shard = shard
        self._member = Membership(device=device, address=address, report=report)
        self._receivers = Receivers(self._member)
        self._held = HeldWeights(rank, arenas, shard, persister)
        self._update: _Update | None = None

    @property
    def whole(self) -> bool:
        """Whether the model may run on its weights."""
        loaded = self._shard.loaded
        return loaded is None or loaded.weight_version is not None

    @property
    def begun(self) -> bool:
        """Whether the weights are an update's, until it is committed or aborted."""
        return self._update is not None or self._held.undecided

    def execute(self, request: pb.WeightUpdateRequest) -> pb.WeightUpdateOk:
        """Takes one step.

        Raises:
            RequestError: the step is not due, or what it says does not fit the model.
            ArenaError: there is no memory for a second arena (both numbers are named), or the supervisor refused.
        """
        ok = pb.WeightUpdateOk()
        if request.HasField("find_persisted"):
            self._held.find_persisted(request.find_persisted.folder, ok)
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
                ok.digest = self._prepare(loaded, request.prepare.version)
            case "commit":
                self._commit(loaded, request.commit.version)
            case "confirm":
                self._held.confirm()
            case "prune_persisted":
                self._held.prune(request.prune_persisted.keep)
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
        self._held.keep(folder)

    def decide(self, request: pb.LoadDenseShardRequest) -> None:
        """A model is about to be loaded: of two sets of weights the one that the engine has chosen stays."""
        self._held.decide(request.held_version if request.HasField("held_version") else None)

    def unload(self) -> None:
        """The model is about to be dropped, and with it whatever is under way."""
        self._held.stop_writing()
        self.leave("the model is unloaded")
        self._held.drop()

    def abort_group(self, reason: str) -> None:
        """Releases the background thread from the trainer's group. From any thread; idempotent."""
        self._member.abort(reason)

    def leave(self, reason: str) -> None:
        """The epoch ends, and with it the group and whatever was under way.

        Which of two whole sets is served next is for the engine to decide: both are kept up to then.
        """
        try:
            self._member.end(reason)
        except RequestError:
            # The supervisor's deadline for leaving an epoch ends the process.
            _logger.exception("the weight update holds up the end of the epoch")
        self._drop_update()

    # ------------------------------------------------------------------------------------ the steps

    def _join(self, join: pb.JoinUpdate) -> None:
        if self._update is not None:
            raise out_of_order("join", "an update is under way: finish or abort it first")
        self._receivers.forget()
        self._member.join(join)

    def _await_index(self, request: pb.AwaitIndex) -> None:
        """Waits for the trainer's first index; the receiving goes on with the same receiver."""
        self._member.group_for("await_index")
        if not self._member.indexed:
            raise out_of_order("await_index", "the group was not joined for transport indexed")
        tensors = self._check_indexed(self._target_plan(), request.tensors)
        receiver = self._receivers.awaiting(tensors, request.tensors)

        def job(task: BackgroundTask) -> None:
            try:
                receiver.wait(task.progress)
            except TrainerStoppedError as error:
                task.stopped = str(error)

        self._member.start(job, step=request.step)

    def _begin(self, loaded: LoadedModel, *, shadow: bool) -> None:
        self._member.group_for("begin")
        if self._update is not None:
            raise out_of_order("begin", "an update is under way: finish or abort it first")
        if self._held.undecided:
            raise out_of_order("begin", "a commit was neither confirmed nor aborted")
        plan = plan_weights(loaded.model)
        arena = loaded.arena
        if shadow:
            if not self.whole:
                raise out_of_order("begin", "the weights are incomplete: only an update in place can heal them")
            arena = Arena.create(self._held.second, plan.size, self._device)
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
        update = self._update_for("receive")
        if update.checked != receive.update:
            raise out_of_order("receive", "these tensors were not checked before")
        update.checked, prepared, update.prepared = None, update.prepared, None
        if prepared is not None and update.shadow:
            self._held.withdraw()
        tensors = read_update(receive.update)
        total, receiving = self._receivers.receiving(tensors, receive.update)
        if not update.shadow:
            self._held.mark_updating(loaded, update.target)

        def job(task: BackgroundTask) -> None:
            try:
                receiving(update.target.load, task.progress)
            except TrainerStoppedError as error:
                task.stopped = str(error)
                raise
            update.received |= {tensor.name for tensor in tensors}

        self._member.start(job, step=receive.step, total_bytes=total)

    def _prepare(self, loaded: LoadedModel, version: int) -> int:
        update = self._update_for("prepare")
        missing = missing_tensors(update.target.plan, update.received)
        if missing:
            raise out_of_order("prepare", f"{len(missing)} tensors of the set have not come, the first is {missing[0]}")
        digests = digest_tensors(update.target.plan, update.target.arena, lambda *_: None)
        if update.shadow:
            self._held.hold(loaded, update.target, digests, version)
        update.prepared = _Prepared(digests, version)
        return shard_digest(digests)

    def _commit(self, loaded: LoadedModel, version: int) -> None:
        update = self._update_for("commit")
        prepared = update.prepared
        if prepared is None:
            raise out_of_order("commit", "the set was not prepared")
        if prepared.version != version:
            raise out_of_order("commit", f"version {version}: the set was prepared as version {prepared.version}")
        commit = self._held.exchange if update.shadow else self._held.commit
        commit(loaded, update.target, prepared.digests, version)
        self._update = None

    def _abort(self, reason: str) -> None:
        self._member.end(reason or "the update was aborted")
        self._drop_update()
        self._held.revert()

    # ---------------------------------------------------------------------------------------- parts

    def _drop_update(self) -> None:
        update, self._update = self._update, None
        if update is not None and update.shadow:
            update.target.arena.close()

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
