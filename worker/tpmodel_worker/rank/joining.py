"""How a rank joins the world of an epoch: the requests Init and NcclSanityCheck."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.comm.build import CommunicatorSpec, build_communicator
from tpmodel_worker.rank.epoch import Epoch
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.rank.session import EpochGate
from tpmodel_worker.rank.status import StatusBoard

_INSTANCE_GRACE_SECONDS = 2.0
_INSTANCE_POLL_SECONDS = 0.05


class Joining:
    """Used by the computing thread."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        arenas: ArenaClient,
        gate: EpochGate,
        status: StatusBoard,
        address: str,
        release: Callable[[str], None],
    ) -> None:
        """address: IP of this pod; "": whichever leads to the rendezvous.

        release: breaks off, from any thread, whatever else goes on in an epoch that was ended.
        """
        self._rank = rank
        self._device = device
        self._arenas = arenas
        self._gate = gate
        self._status = status
        self._address = address
        self._release = release

    def init(self, epoch: Epoch, request: pb.SessionRequest) -> pb.SessionResponse:
        """Builds the world's communicator; once it is built, says so again.

        Raises:
            RequestError: the request is not one for this rank, or comes from another engine than the pod's supervisor
                registered with.
            EpochEndedError, CommunicatorError: the others did not come in time, or the epoch was ended meanwhile.
        """
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
            self._release(reason)

        self._gate.attach(epoch.number, release)
        self._status.update(state="initialised", world_size=init.world_size, communicator=communicator.name)
        seconds = time.perf_counter() - started
        return pb.SessionResponse(init_ok=pb.InitOk(communicator=communicator.name, seconds=seconds))

    def sanity_check(self, epoch: Epoch, _request: pb.SessionRequest) -> pb.SessionResponse:
        """How many ranks the communicator reaches. Raises RequestError, CommunicatorError."""
        total = epoch.joined().all_reduce(torch.ones(1, device=self._device))
        return pb.SessionResponse(nccl_sanity_result=pb.NcclSanityResult(observed_sum=float(total.item())))

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
