"""The process group of the trainer and the ranks of one gang or several."""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.trainer.errors import WeightUpdateError
from tpmodel.trainer.gang import Gang
from tpmodel.trainer.options import UpdateOptions
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.auth import update_group_key
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.indexed_group import IndexedGroups, join_indexed_groups
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
        size = 1 + sum(gang.world_size for gang in gangs)
        self._store: TCPStore | None = _open_store(address)
        self._communicator: Communicator | IndexedGroups | None = None
        with ThreadPoolExecutor(len(gangs)) as threads:
            joining = [
                threads.submit(
                    gang.init, _init_request(options, address, self._store.port, index, size), 2 * options.join_seconds
                )
                for index, gang in enumerate(gangs)
            ]
            failure: Exception | None = None
            try:
                self._communicator = _join(options, token, address, self._store.port, size)
            except CommunicatorError as error:
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
    def communicator(self) -> Communicator | IndexedGroups:
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


def _join(options: UpdateOptions, token: str, address: str, port: int, size: int) -> Communicator | IndexedGroups:
    device = torch.device(options.device)
    if options.transport == "indexed":
        return join_indexed_groups(
            master_address=address,
            master_port=port,
            rank=TRAINER,
            size=size,
            device=device,
            address=address,
            backend=options.backend,
            timeout_seconds=options.join_seconds,
            deadline_seconds=options.deadline_seconds,
        )
    return join_update_group(
        master_address=address,
        master_port=port,
        rank=TRAINER,
        size=size,
        device=device,
        key=update_group_key(token, address, port),
        address=address,
        backend=options.backend,
        timeout_seconds=options.join_seconds,
        deadline_seconds=options.deadline_seconds,
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


def _init_request(options: UpdateOptions, address: str, port: int, index: int, size: int) -> pb.InitUpdateRequest:
    return pb.InitUpdateRequest(
        master_address=address,
        master_port=port,
        rank_offset=1,
        world_size=size,
        mode=_MODES[options.mode],
        gang_index=index,
        timeout_seconds=options.join_seconds,
        deadline_seconds=options.deadline_seconds,
        transport=_TRANSPORTS[options.transport],
        backend=options.backend,
    )
