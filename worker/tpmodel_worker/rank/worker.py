"""The computing thread of a rank: takes requests in order, executes them, answers each."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.kv.rank_handovers import Handovers
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.persisted import PersistedWeightsError
from tpmodel_worker.models.config import ConfigError
from tpmodel_worker.rank.epoch import Epoch
from tpmodel_worker.rank.errors import RequestError, describe
from tpmodel_worker.rank.joining import Joining
from tpmodel_worker.rank.model_requests import ModelRequests
from tpmodel_worker.rank.replies import ReplyThread, Send
from tpmodel_worker.rank.session import EpochEndedError, EpochGate
from tpmodel_worker.rank.shard import ShardHolder
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.rank.transfer_requests import TransferRequests
from tpmodel_worker.weights.copying import WeightCopies
from tpmodel_worker.weights.persister import Persister
from tpmodel_worker.weights.updates import WeightUpdates

_logger = logging.getLogger(__name__)

ABORT_SECONDS = 5.0
"""How long leaving an epoch may take before the supervisor kills the rank."""
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
        self._gate = gate
        self._status = status
        device_id, persister = _device_id(device), Persister(rank, status.persist)
        shard = ShardHolder(rank=rank, device=device, arenas=arenas, device_sharers=device_sharers)
        self._updates = updates = WeightUpdates(
            rank=rank,
            device=device,
            arenas=arenas,
            shard=shard,
            address=address,
            report=status.weight_update,
            persister=persister,
        )
        self.handovers = handovers = Handovers(
            rank=rank, device=device, device_id=device_id, address=address, token=token
        )
        copies = WeightCopies(
            rank=rank,
            device=device,
            address=address,
            arenas=arenas,
            shard=shard,
            transfers=handovers,
            persister=persister,
            updating=lambda: updates.begun,
        )
        self._model = model = ModelRequests(
            rank=rank,
            device_id=device_id,
            gate=gate,
            status=status,
            shard=shard,
            updates=updates,
            copies=copies,
            handovers=handovers,
        )
        joining = Joining(
            rank=rank,
            device=device,
            arenas=arenas,
            gate=gate,
            status=status,
            address=address,
            release=self._break_off,
        )
        transfers = TransferRequests(status=status, shard=shard, updates=updates, copies=copies, handovers=handovers)
        self._commands: queue.SimpleQueue[_Open | _Leave | pb.SessionRequest] = queue.SimpleQueue()
        self._epoch: Epoch | None = None
        self._handlers: dict[str, Callable[[Epoch, pb.SessionRequest], pb.SessionResponse]] = {
            "init": joining.init,
            "nccl_sanity_check": joining.sanity_check,
            "load_dense_shard": model.load,
            "clear_kv_cache": model.clear,
            "unload_model": model.unload,
            "weight_update": transfers.update_weights,
            "weight_copy": transfers.copy_weights,
            "kv_transfer": transfers.transfer_kv,
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
                    self._epoch = Epoch(command.epoch, replies)
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
            _logger.error("the thread of a transfer does not end", extra={"epoch": epoch.number})
        # The other gang's ranks know them by this world.
        self.handovers.close_pipes("the epoch ends")
        epoch.close(ABORT_SECONDS)
        self._model.drop_unfinished()
        self._status.update(communicator="", slots_used=0)

    def _break_off(self, reason: str) -> None:
        """What goes on beside the plans of an epoch that was ended. From any thread."""
        self._updates.abort_group(reason)
        self.handovers.cancel_all(reason)

    def _execute(self, epoch: Epoch, request: pb.SessionRequest) -> None:
        name = request.WhichOneof("request") or ""
        fields = {"epoch": request.epoch, "seq": request.seq}
        try:
            self._gate.check(epoch.number)
            if name == "generate_step":
                self._model.generate(epoch, request.seq, request.generate_step)
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

    def _shut_down(self, _epoch: Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        return pb.SessionResponse(bye=pb.Bye())


def _device_id(device: torch.device) -> str:
    """The same in every process; "" on CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
