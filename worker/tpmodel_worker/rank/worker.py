"""The computing thread of a rank: takes requests in order, executes them, answers each."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.kv.errors import KvMismatchError
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.plan import plan_transfer
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.persisted import PersistedWeightsError
from tpmodel_worker.models.config import ConfigError
from tpmodel_worker.rank.errors import RequestError, describe
from tpmodel_worker.rank.replies import ReplyThread, Send
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.session import EpochEndedError, EpochGate
from tpmodel_worker.rank.shard import ShardHolder
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.updates import WeightUpdates

_logger = logging.getLogger(__name__)

ABORT_SECONDS = 5.0
"""How long leaving an epoch may take before the supervisor kills the rank."""
_INSTANCE_GRACE_SECONDS = 2.0
_INSTANCE_POLL_SECONDS = 0.05
_PROGRESS_SECONDS = 0.1
# Failures whose message says it all: no traceback is logged.
_EXPECTED = (
    RequestError,
    EpochEndedError,
    CommunicatorError,
    ConfigError,
    CheckpointError,
    PersistedWeightsError,
    ArenaError,
)


@dataclass(frozen=True, slots=True)
class _Open:
    epoch: int
    send: Send


@dataclass(frozen=True, slots=True)
class _Leave:
    epoch: int
    left: Callable[[], None]


@dataclass(slots=True)
class _Epoch:
    """What belongs to one epoch and ends with it."""

    number: int
    replies: ReplyThread
    init: pb.InitRequest | None = None
    communicator: Communicator | None = None
    runner: StepRunner | None = None
    failed_seq: int = 0
    """The plan that failed: the slots are undefined since, until they are cleared."""


class Worker:
    """Runs in the main thread of the rank process; other threads hand it work through the first three methods."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        arenas: ArenaClient,
        gate: EpochGate,
        status: StatusBoard,
        address: str = "",
        token: str = "",
        device_sharers: int = 1,
    ) -> None:
        """address: IP of this pod; "": whichever leads to the rendezvous. token: the gang's.

        device_sharers: ranks that have the same CUDA device, this one included.
        """
        self._rank = rank
        self._address = address
        self._device = device
        self._arenas = arenas
        self._gate = gate
        self._status = status
        self._shard = ShardHolder(rank=rank, device=device, arenas=arenas, device_sharers=device_sharers)
        self._updates = WeightUpdates(
            rank=rank,
            device=device,
            arenas=arenas,
            shard=self._shard,
            address=address,
            report=status.weight_update,
            persister=Persister(rank, status.persist),
        )
        self._device_id = _device_id(device)
        self.handovers = Handovers(rank=rank, device=device, device_id=self._device_id, address=address, token=token)
        self._commands: queue.SimpleQueue[_Open | _Leave | pb.SessionRequest] = queue.SimpleQueue()
        self._epoch: _Epoch | None = None
        self._handlers: dict[str, Callable[[_Epoch, pb.SessionRequest], pb.SessionResponse]] = {
            "init": self._init,
            "nccl_sanity_check": self._sanity_check,
            "load_dense_shard": self._load,
            "clear_kv_cache": self._clear,
            "unload_model": self._unload,
            "weight_update": self._update_weights,
            "kv_transfer": self._transfer_kv,
            "shutdown": self._shut_down,
        }

    def open(self, epoch: int, send: Send) -> None:
        """A session of a newer epoch begins; its replies go to send, from other threads."""
        self._commands.put(_Open(epoch, send))

    def submit(self, request: pb.SessionRequest) -> None:
        """A request that its session has accepted."""
        self._commands.put(request)

    @property
    def abort_seconds(self) -> float:
        """How long leaving the present epoch may take before the supervisor kills the rank. From any thread."""
        epoch = self._epoch
        communicator = epoch.communicator if epoch is not None else None
        return communicator.abort_seconds if communicator is not None else ABORT_SECONDS

    def leave(self, epoch: int, left: Callable[[], None]) -> None:
        """Calls left, in the computing thread, once that is out of the epoch and all older ones.

        The gate has ended the epoch before.
        """
        self._commands.put(_Leave(epoch, left))

    def run(self) -> None:
        """Executes until a Shutdown request has been answered."""
        with torch.inference_mode():
            while True:
                command = self._commands.get()
                if isinstance(command, _Open):
                    self._leave()
                    replies = ReplyThread(command.epoch, rank=self._rank, status=self._status, send=command.send)
                    self._epoch = _Epoch(command.epoch, replies)
                    self._status.update(epoch=command.epoch, state="idle", last_seq=0, checksum=0)
                elif isinstance(command, _Leave):
                    if self._epoch is not None and self._epoch.number <= command.epoch:
                        self._leave()
                        self._status.update(state="aborted")
                    command.left()
                elif self._epoch is not None and command.epoch == self._epoch.number:
                    self._execute(self._epoch, command)
                    if command.HasField("shutdown"):
                        self._leave()
                        # A process that ends while a group is taken apart is aborted.
                        self.handovers.join_pipes()
                        return

    def _leave(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is None:
            return
        epoch.runner = None
        self._updates.leave("the epoch ends")
        while not self.handovers.leave("the epoch ends"):
            # What comes next would be written into; the supervisor's deadline ends the process.
            _logger.error("the thread of a KV transfer does not end", extra={"epoch": epoch.number})
        # The other gang's ranks know them by this world.
        self.handovers.close_pipes("the epoch ends")
        if not epoch.replies.close(ABORT_SECONDS):
            _logger.error("the device does not finish its work", extra={"epoch": epoch.number})
        if epoch.communicator is not None:
            try:
                epoch.communicator.close()
            except CommunicatorError:
                _logger.warning("closing the communicator failed", exc_info=True, extra={"epoch": epoch.number})
        self._status.update(communicator="", slots_used=0)

    def _execute(self, epoch: _Epoch, request: pb.SessionRequest) -> None:
        name = request.WhichOneof("request") or ""
        fields = {"epoch": request.epoch, "seq": request.seq}
        try:
            self._gate.check(epoch.number)
            if name == "generate_step":
                self._generate(epoch, request.seq, request.generate_step)
                return
            response = self._handlers[name](epoch, request)
            response.epoch, response.seq = request.epoch, request.seq
            self._status.update(last_seq=request.seq)
        except _EXPECTED as error:
            response = pb.SessionResponse(epoch=request.epoch, seq=request.seq, error=describe(error))
            _logger.warning("%s failed: %s", name, response.error.message, extra=fields)
        except Exception as error:  # The boundary: whatever a request raises becomes its reply.
            response = pb.SessionResponse(epoch=request.epoch, seq=request.seq, error=describe(error))
            _logger.exception("%s failed", name, extra=fields)
        epoch.replies.response(response)

    def _init(self, epoch: _Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        init = request.init
        if init.rank != self._rank or not init.rank < init.world_size or len(init.pods) != init.world_size:
            message = f"rank {init.rank} of {init.world_size} in {len(init.pods)} pods: this is rank {self._rank}"
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, message)
        if epoch.communicator is not None:
            if init != epoch.init:
                raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, "the world of this epoch was built otherwise")
            return pb.SessionResponse(init_ok=pb.InitOk(communicator=epoch.communicator.name))
        self._check_instance(init.instance_id)
        started = time.perf_counter()
        spec = CommunicatorSpec(
            epoch=epoch.number,
            rank=init.rank,
            world_size=init.world_size,
            rendezvous=init.rendezvous,
            rendezvous_id=init.rendezvous_id,
            timeout_seconds=init.timeout_seconds,
            pods=tuple(init.pods),
            kind=init.communicator,
            address=self._address,
        )
        cancelled = threading.Event()
        self._gate.attach(epoch.number, lambda _reason: cancelled.set())
        communicator = build_communicator(spec, device=self._device, arenas=self._arenas, cancelled=cancelled)
        epoch.communicator, epoch.init = communicator, init

        def release(reason: str) -> None:
            communicator.abort(reason)
            self._updates.abort_group(reason)
            self.handovers.cancel_all(reason)

        self._gate.attach(epoch.number, release)
        self._status.update(state="initialised", world_size=init.world_size, communicator=communicator.name)
        seconds = time.perf_counter() - started
        return pb.SessionResponse(init_ok=pb.InitOk(communicator=communicator.name, seconds=seconds))

    def _check_instance(self, instance: str) -> None:
        # The engine may dial before the supervisor has read the answer to its registration.
        deadline = time.monotonic() + _INSTANCE_GRACE_SECONDS
        while (registered := self._arenas.instance_id()) not in ("", instance):
            if time.monotonic() >= deadline:
                raise RequestError(
                    pb.ERROR_KIND_WRONG_INSTANCE,
                    f"engine {instance!r} is not the one that this rank's supervisor registered with: {registered!r}",
                )
            time.sleep(_INSTANCE_POLL_SECONDS)

    def _sanity_check(self, epoch: _Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        total = self._communicator(epoch).all_reduce(torch.ones(1, device=self._device))
        result = pb.NcclSanityResult(observed_sum=float(total.item()))
        return pb.SessionResponse(nccl_sanity_result=result)

    def _load(self, epoch: _Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        communicator = self._communicator(epoch)
        assert epoch.init is not None
        epoch.runner = None
        reported = 0.0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal reported
            self._gate.check(epoch.number)
            now = time.monotonic()
            if now - reported < _PROGRESS_SECONDS and done < total:
                return
            reported = now
            message = pb.Progress(what=what, done_bytes=done, total_bytes=total)
            self._status.progress(message)
            epoch.replies.response(pb.SessionResponse(epoch=epoch.number, seq=request.seq, progress=message))

        self._leave_handovers("a model is loaded")
        self._status.update(state="loading")
        pods = epoch.init.pods
        try:
            ok = self._shard.load(
                request.load_dense_shard,
                communicator,
                ranks_on_host=sum(pod == pods[self._rank] for pod in pods),
                progress=progress,
            )
        finally:
            self._show_model()
        ok.device_id = self._device_id
        self._updates.keep(request.load_dense_shard.persist_folder)
        return pb.SessionResponse(load_dense_shard_ok=ok)

    def _clear(self, epoch: _Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        communicator = self._communicator(epoch)
        self._leave_handovers("the KV cache is emptied")
        epoch.runner = None
        epoch.runner = self._shard.clear(request.clear_kv_cache.num_blocks, communicator)
        epoch.failed_seq = 0
        self._show_model()
        self._status.update(state="serving", slots_used=0)
        return pb.SessionResponse(kv_cache_cleared=pb.KvCacheCleared(num_blocks=self._shard.kv_blocks))

    def _update_weights(self, epoch: _Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        self._communicator(epoch)
        ok = self._updates.execute(request.weight_update)
        loaded = self._shard.loaded
        if loaded is not None:
            self._status.update(weight_version=loaded.weight_version or 0, weights_digest=loaded.digest)
        return pb.SessionResponse(weight_update_ok=ok)

    def _transfer_kv(self, epoch: _Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        transfer = request.kv_transfer
        layout = self._shard.kv_layout
        if layout is None or epoch.runner is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "there is no KV cache: load and clear come first")
        ok = pb.KvTransferOk()
        try:
            source, target = KvLayout.from_message(transfer.source), KvLayout.from_message(transfer.target)
            plan = plan_transfer(source, target)
            cache = self._shard.request_cache(blocks=transfer.blocks, slot=transfer.slot, tokens=transfer.tokens)
            match transfer.WhichOneof("role"):
                case "send" if source == layout:
                    ok.endpoints.extend(self.handovers.send(transfer, plan, cache))
                case "receive" if target == layout:
                    self.handovers.receive(transfer, plan, cache)
                case role:
                    raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, f"{role}: this rank's cache is {layout}")
        except (KvMismatchError, ValueError) as error:
            raise RequestError(pb.ERROR_KIND_INVALID_ARGUMENT, str(error)) from error
        return pb.SessionResponse(kv_transfer_ok=ok)

    def _leave_handovers(self, reason: str) -> None:
        if not self.handovers.leave(reason):
            # Memory that a thread writes can't be given to anybody else.
            raise RequestError(pb.ERROR_KIND_INTERNAL, f"{reason}, but the thread of a KV transfer does not end")

    def _unload(self, epoch: _Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        epoch.runner = None
        self._updates.unload()
        self._leave_handovers("the model is unloaded")
        freed = self._shard.unload()
        self._show_model()
        self._status.update(slots_used=0)
        return pb.SessionResponse(unloaded=pb.Unloaded(freed_bytes=freed))

    def _shut_down(self, _epoch: _Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        return pb.SessionResponse(bye=pb.Bye())

    def _generate(self, epoch: _Epoch, seq: int, plan: pb.GenerateStepRequest) -> None:
        runner = epoch.runner
        if runner is None:
            what = "no model is loaded" if self._shard.loaded is None else "the KV cache was not made: ClearKvCache"
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, what)
        if plan.steps and not self._updates.whole:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "the weights are incomplete: an update did not finish")
        if epoch.failed_seq:
            raise RequestError(
                pb.ERROR_KIND_ABORTED, f"plan {epoch.failed_seq} failed before: clear the KV cache first"
            )
        epoch.failed_seq = seq
        runner.execute(seq, plan, submit=epoch.replies.step, check=lambda: self._gate.check(epoch.number))
        epoch.failed_seq = 0
        if plan.releases or plan.admissions:
            self._status.update(slots_used=runner.slots.used)

    def _communicator(self, epoch: _Epoch) -> Communicator:
        if epoch.communicator is None:
            message = "the communicator was not built: Init comes first"
            raise RequestError(pb.ERROR_KIND_NCCL_NOT_INITIALISED, message)
        return epoch.communicator

    def _show_model(self) -> None:
        loaded = self._shard.loaded
        self._status.progress(None)
        self._status.update(
            state="loaded" if loaded is not None else "initialised",
            model_id=self._shard.model_id,
            weights_bytes=loaded.bytes if loaded is not None else 0,
            weights_digest=loaded.digest if loaded is not None else 0,
            bytes_read=loaded.bytes_read if loaded is not None else 0,
            weight_version=(loaded.weight_version or 0) if loaded is not None else 0,
            kv_bytes=self._shard.kv_bytes,
            kv_blocks=self._shard.kv_blocks,
        )


def _device_id(device: torch.device) -> str:
    """The same in every process; "" on CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
