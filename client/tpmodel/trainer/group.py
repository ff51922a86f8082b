"""The process group of the trainer and the ranks of one gang or several."""

from __future__ import annotations

import dataclasses
import logging
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.trainer.errors import WeightUpdateError
from tpmodel.trainer.gang import Gang
from tpmodel.trainer.options import UpdateOptions
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.auth import update_group_key
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.group import UpdateGroup, join_group
from tpmodel_worker.weights.member import GroupMember, Rehearsal, default_backend
from tpmodel_worker.weights.packing import TensorInfo
from tpmodel_worker.weights.ranks import TRAINER

_TRANSPORTS = {"ordered": pb.UPDATE_TRANSPORT_ORDERED, "indexed": pb.UPDATE_TRANSPORT_INDEXED}
_MODES = {"in_place": pb.UPDATE_MODE_IN_PLACE, "shadow": pb.UPDATE_MODE_SHADOW}

logger = logging.getLogger(__name__)


class GangGroup:
    """Joined while it exists; a gang is in one group at a time."""

    def __init__(self, gangs: Sequence[Gang], token: str, options: UpdateOptions) -> None:
        """Returns once the ranks of all gangs have joined.

        Raises:
            WeightUpdateError: a gang can't join.
        """
        self.gangs = tuple(gangs)
        address = options.address or own_address(gangs[0].target)
        self._store: TCPStore | None = _open_store(address)
        member = _member(options, address, self._store.port, gangs)
        key = update_group_key(token, address, self._store.port)
        self._communicator: UpdateGroup | None = None
        refused = threading.Event()
        with ThreadPoolExecutor(len(gangs)) as threads:
            joining = [
                threads.submit(gang.init, _init_request(options, member, index), 2 * options.join_seconds)
                for index, gang in enumerate(gangs)
            ]
            for future in joining:
                # Nobody waits for the ranks of a gang that has refused.
                future.add_done_callback(lambda future: refused.set() if future.exception() is not None else None)
            failure: Exception | None = None
            try:
                indexed = options.transport == "indexed"
                self._communicator = join_group(member, indexed=indexed, key=key, cancelled=refused)
            except (CommunicatorError, TimeoutError) as error:
                failure = error
        try:
            for future in joining:
                # What a gang says is more telling than that it did not come.
                future.result()
            if failure is not None:
                raise WeightUpdateError("ABORTED", f"the group could not be joined: {failure}") from failure
        except BaseException:
            self.leave("a gang could not join")
            raise

    @property
    def communicator(self) -> UpdateGroup:
        """What tensors are broadcast by. Raises WeightUpdateError once the group was left."""
        if self._communicator is None:
            raise WeightUpdateError("ABORTED", "the group was left")
        return self._communicator

    def leave(self, reason: str) -> None:
        """Ends the trainer's part of the group, and so the group. Idempotent."""
        communicator, self._communicator = self._communicator, None
        if communicator is not None:
            communicator.abort(reason)
            communicator.close()
        self._store = None

    def abort(self, reason: str) -> None:
        """Every gang ends its update, whatever the others say; the group is of no use afterwards."""
        self.leave(reason)
        for gang in self.gangs:
            try:
                gang.abort(reason)
            except WeightUpdateError as error:
                logger.warning("%s", error)


def rehearsal_of(gang: Gang, options: UpdateOptions) -> Rehearsal | None:
    """What the members do once before the first update: nothing between CPUs, where it would cost what it saves."""
    backend = options.backend or default_backend(torch.device(options.device))
    if options.transport == "indexed" or backend != "nccl":
        return None
    tensors = [TensorInfo(name, info.dtype, tuple(info.shape)) for name, info in gang.parameters.items()]
    largest = max(tensors, key=lambda tensor: tensor.bytes)
    if not options.packed:
        return Rehearsal(largest.bytes, 1, largest.dtype)
    # A chunk is closed by the tensor that takes it over the size.
    chunk = min(options.buffer_size + largest.bytes, sum(tensor.bytes for tensor in tensors))
    return Rehearsal(chunk, options.buffer_count, largest.dtype)


def _member(options: UpdateOptions, address: str, port: int, gangs: Sequence[Gang]) -> GroupMember:
    """The trainer, which is followed by the ranks of all gangs."""
    return GroupMember(
        master_address=address,
        master_port=port,
        rank=TRAINER,
        size=1 + sum(gang.world_size for gang in gangs),
        device=torch.device(options.device),
        address=address,
        backend=options.backend,
        timeout_seconds=options.join_seconds,
        deadline_seconds=options.deadline_seconds,
        rehearsal=rehearsal_of(gangs[0], options),
    )


def _open_store(address: str) -> TCPStore:
    try:
        return start_store(address)
    except CommunicatorError as error:
        message = f"the trainer cannot listen at address {address}, which has to be one of this machine's: {error}"
        raise WeightUpdateError("INVALID_ARGUMENT", message) from error


def own_address(target: str) -> str:
    """The address of this machine from which a target is reached; nothing is sent."""
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def _init_request(options: UpdateOptions, trainer: GroupMember, index: int) -> pb.InitUpdateRequest:
    rehearsal = trainer.rehearsal
    return pb.InitUpdateRequest(
        master_address=trainer.master_address,
        master_port=trainer.master_port,
        rank_offset=TRAINER + 1,
        world_size=trainer.size,
        mode=_MODES[options.mode],
        gang_index=index,
        timeout_seconds=trainer.timeout_seconds,
        deadline_seconds=trainer.deadline_seconds,
        transport=_TRANSPORTS[options.transport],
        backend=trainer.backend,
        rehearsal=pb.UpdateRehearsal(**dataclasses.asdict(rehearsal)) if rehearsal is not None else None,
    )
