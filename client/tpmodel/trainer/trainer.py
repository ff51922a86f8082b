"""The trainer's side of live weight updates."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.trainer.errors import UpdateOrderError, WeightUpdateError
from tpmodel.trainer.gang import Gang
from tpmodel.trainer.options import Running, UpdateOptions
from tpmodel.trainer.transfer import Progress
from tpmodel.trainer.update import Update, Weights
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.indexed_group import IndexedGroups, join_indexed_groups
from tpmodel_worker.weights.packing import TensorInfo, describe
from tpmodel_worker.weights.ranks import TRAINER

_RUNNING = {
    "finish": pb.RUNNING_REQUESTS_FINISH,
    "keep": pb.RUNNING_REQUESTS_KEEP,
    "abort": pb.RUNNING_REQUESTS_ABORT,
}
_TRANSPORTS = {"ordered": pb.UPDATE_TRANSPORT_ORDERED, "indexed": pb.UPDATE_TRANSPORT_INDEXED}
_MODES = {"in_place": pb.UPDATE_MODE_IN_PLACE, "shadow": pb.UPDATE_MODE_SHADOW}
logger = logging.getLogger(__name__)


def connect(
    targets: str | Sequence[str], *, token: str, options: UpdateOptions | Mapping[str, Any] | None = None
) -> Trainer:
    """Joins with the ranks of one gang or more.

    Args:
        targets: host:port of the control port of every gang's leader.
        token: of the gangs.
        options: the dataclass, or a dict of its fields.

    Raises:
        WeightUpdateError: a gang can't be reached or can't join.
        ValueError: the options can't be, or the gangs are not alike.
    """
    trainer = Trainer([targets] if isinstance(targets, str) else targets, token, UpdateOptions.of(options))
    try:
        trainer.join()
    except BaseException:
        trainer.close()
        raise
    return trainer


class Trainer:
    """Sends the weights of one model to all ranks of its gangs. Not for several threads; a context manager."""

    def __init__(self, targets: Sequence[str], token: str, options: UpdateOptions) -> None:
        """Does nothing yet; use connect."""
        if not targets:
            raise ValueError("there is no gang to connect to")
        self.options = options
        self._token = token
        self._gangs = [Gang(target, token) for target in targets]
        self._group: Communicator | IndexedGroups | None = None
        self._store: TCPStore | None = None
        self._update: Update | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def parameters(self) -> Mapping[str, pb.ParameterInfo]:
        """What a full set is made of, by name: shape, dtype and how the ranks split it."""
        return self._gangs[0].parameters

    def versions(self) -> list[int | None]:
        """What every gang serves; None: nothing, its weights are not whole."""
        return [gang.version() for gang in self._gangs]

    def join(self) -> None:
        """Makes the group anew: after a failed update, or when a gang has lost a rank. Raises as connect."""
        if self._update is not None:
            raise UpdateOrderError("an update is under way: finish or abort it first")
        self._leave("the trainer joins anew")
        for gang in self._gangs:
            gang.describe()
        self._check_gangs()
        options = self.options
        address = options.address or _own_address(self._gangs[0].target)
        ranks = sum(gang.world_size for gang in self._gangs)
        store = self._store = start_store(address)
        with ThreadPoolExecutor(len(self._gangs)) as threads:
            joining = [
                threads.submit(
                    gang.init, self._init_request(address, store.port, index, 1 + ranks), 2 * options.join_seconds
                )
                for index, gang in enumerate(self._gangs)
            ]
            failure: Exception | None = None
            try:
                self._group = self._join_group(address, store.port, 1 + ranks)
            except CommunicatorError as error:
                failure = error
            for future in joining:
                # What a gang says is more telling than that it did not come.
                future.result()
        if failure is not None:
            raise WeightUpdateError("ABORTED", f"the group could not be joined: {failure}") from failure

    def _join_group(self, address: str, port: int, size: int) -> Communicator | IndexedGroups:
        options = self.options
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
            token=self._token,
            address=address,
            backend=options.backend,
            timeout_seconds=options.join_seconds,
            deadline_seconds=options.deadline_seconds,
        )

    @contextlib.contextmanager
    def update(self, version: int, *, running: Running = "keep") -> Iterator[Update]:
        """An update that ends with finish where the block ends well, and with abort whatever else happens.

        Args:
            version: above every one before; 0 is the checkpoint.
            running: what becomes of requests that run: finish them first, keep them (they go on with the new
                weights behind the tokens that they have), or abort them.

        Raises:
            WeightUpdateError: a gang refused or failed. The message says what it serves now.
            UpdateOrderError: an update is under way, or the group has failed: join() first.
        """
        if running not in _RUNNING:
            raise ValueError(f"running is {running!r}: finish, keep or abort")
        if self._update is not None:
            raise UpdateOrderError("an update is under way: finish or abort it first")
        if self._group is None:
            raise UpdateOrderError("the group is gone: join() first")
        update = self._update = Update(self._gangs, self._group, self.options)
        try:
            update._start(_RUNNING[running])
            yield update
            update._finish(version)
        except BaseException as error:
            update._cancel()
            self._abort(f"{type(error).__name__}: {error}")
            raise
        finally:
            self._update = None

    def send_weights(
        self, weights: Weights, *, version: int, running: Running = "keep", progress: Progress | None = None
    ) -> None:
        """One whole update: start, all tensors, finish.

        Args:
            weights: full tensors by their names in the checkpoint, on any device: a mapping, or pairs, which may be
                made as they are asked for.
            version: as in update.
            running: as in update.
            progress: hears of bytes sent.

        Raises: as update, and ValueError for a tensor that the model does not have, before anything is sent.
        """
        if isinstance(weights, Mapping):
            self.check([describe(name, tensor) for name, tensor in weights.items()], full=True)
        with self.update(version, running=running) as update:
            update.send(weights, progress)

    def check(self, tensors: Sequence[TensorInfo], *, full: bool = False) -> None:
        """Raises ValueError where the gangs' models have no such tensor, or (full) a tensor that is not there."""
        for gang in self._gangs:
            for tensor in tensors:
                gang.check(tensor)
        given = {tensor.name for tensor in tensors}
        missing = [name for name, info in self.parameters.items() if not info.tied and name not in given]
        if full and missing:
            raise ValueError(f"{len(missing)} tensors of a full set are missing, the first is {missing[0]}")

    def close(self) -> None:
        """Ends what is under way, leaves the group with all ranks, and closes the connections. Idempotent."""
        if self._group is not None:
            self._abort("the trainer is closed")
        self._update = None
        for gang in self._gangs:
            gang.close()

    def _abort(self, reason: str) -> None:
        """Every gang ends the update, whatever the others say; the group is of no use afterwards."""
        self._leave(reason)
        for gang in self._gangs:
            try:
                gang.abort(reason)
            except WeightUpdateError as error:
                logger.warning("%s", error)

    def _leave(self, reason: str) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort(reason)
            group.close()
        self._store = None

    def _check_gangs(self) -> None:
        first = self._gangs[0]
        kind = torch.device(self.options.device).type
        for gang in self._gangs:
            if gang.device != kind and self.options.backend != "gloo":
                raise ValueError(f"gang {gang.target} is on {gang.device}, the trainer's device is {kind}")
            if (gang.world_size, gang.parameters) != (first.world_size, first.parameters):
                raise ValueError(f"gangs {first.target} and {gang.target} have other models or world sizes")

    def _init_request(self, address: str, port: int, index: int, group_size: int) -> pb.InitUpdateRequest:
        return pb.InitUpdateRequest(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=group_size,
            mode=_MODES[self.options.mode],
            gang_index=index,
            timeout_seconds=self.options.join_seconds,
            deadline_seconds=self.options.deadline_seconds,
            transport=_TRANSPORTS[self.options.transport],
            backend=self.options.backend,
        )


def _own_address(target: str) -> str:
    """The address of this machine from which a target is reached; nothing is sent."""
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
