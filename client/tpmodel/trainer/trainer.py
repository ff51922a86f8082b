"""The trainer's side of live weight updates."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.trainer.errors import UpdateOrderError, WeightUpdateError
from tpmodel.trainer.gang import Gang, UpdateCall
from tpmodel.trainer.options import Running, UpdateOptions
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.packing import TensorInfo, describe, write_update
from tpmodel_worker.weights.ranks import TRAINER

Weights = Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]] | Sequence[tuple[str, torch.Tensor]]
Progress = Callable[[int, int], None]
"""Called with bytes sent, and bytes of the whole update where they are known, else 0."""

_RUNNING = {
    "finish": pb.RUNNING_REQUESTS_FINISH,
    "keep": pb.RUNNING_REQUESTS_KEEP,
    "abort": pb.RUNNING_REQUESTS_ABORT,
}
_MODES = {"in_place": pb.UPDATE_MODE_IN_PLACE, "shadow": pb.UPDATE_MODE_SHADOW}
_FINISH_SECONDS = 3600.0

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
        self._group: Communicator | None = None
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
                self._group = join_update_group(
                    master_address=address,
                    master_port=store.port,
                    rank=TRAINER,
                    size=1 + ranks,
                    device=torch.device(options.device),
                    token=self._token,
                    address=address,
                    timeout_seconds=options.join_seconds,
                    deadline_seconds=options.deadline_seconds,
                )
            except CommunicatorError as error:
                failure = error
            for future in joining:
                # What a gang says is more telling than that it did not come.
                future.result()
        if failure is not None:
            raise WeightUpdateError("ABORTED", f"the group could not be joined: {failure}") from failure

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
            if gang.device != kind:
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
        )


class Update:
    """What is between start and finish. Use Trainer.update."""

    def __init__(self, gangs: Sequence[Gang], group: Communicator, options: UpdateOptions) -> None:
        self._gangs = gangs
        self._group = group
        self._options = options
        self._sent = 0
        self._started = False

    def send(self, weights: Weights, progress: Progress | None = None) -> None:
        """Sends tensors in order; may be called more than once.

        Returns once every rank has them: the tensors may be changed then.

        Raises:
            ValueError: a tensor does not fit the model; nothing of its group was sent.
            WeightUpdateError: a gang failed.
        """
        if not self._started:
            raise UpdateOrderError("the update has not started, or is over")
        if isinstance(weights, Mapping):
            self._send(weights, progress)
            return
        for group in _in_groups(weights, self._options.group_bytes):
            self._send(group, progress)

    def _start(self, running: pb.RunningRequests.ValueType) -> None:
        for gang in self._gangs:
            gang.start(running, _FINISH_SECONDS)
        self._started = True

    def _finish(self, version: int) -> None:
        self._started = False
        for gang in self._gangs:
            gang.finish(version)

    def _send(self, tensors: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
        options = self._options
        infos = [describe(name, tensor) for name, tensor in tensors.items()]
        for gang in self._gangs:
            for info in infos:
                gang.check(info)
        request = write_update(
            infos, packed=options.packed, buffer_size=options.buffer_size, buffer_count=options.buffer_count
        )
        broadcaster = Broadcaster(
            self._group,
            infos,
            buffer_size=options.buffer_size if options.packed else 0,
            buffer_count=options.buffer_count if options.packed else 1,
        )
        calls = [gang.update(request, self._group.abort) for gang in self._gangs]
        try:
            self._broadcast(broadcaster, calls, tensors, progress)
        except BaseException:
            for call in calls:
                call.cancel()
            raise
        self._sent += broadcaster.total_bytes

    def _broadcast(
        self,
        broadcaster: Broadcaster,
        calls: Sequence[UpdateCall],
        tensors: Mapping[str, torch.Tensor],
        progress: Progress | None,
    ) -> None:
        for call in calls:
            call.wait_until_ready()
        total = self._sent + broadcaster.total_bytes
        report = (lambda sent: progress(self._sent + sent, total)) if progress is not None else (lambda _sent: None)
        try:
            with torch.no_grad():
                broadcaster.send(tensors.__getitem__, report, self._options.deadline_seconds)
        except (CommunicatorError, TimeoutError) as error:
            # What a gang has to say about it tells more.
            failures = [call.error for call in calls if call.error is not None]
            raise (failures[0] if failures else WeightUpdateError("ABORTED", str(error))) from error
        for call in calls:
            call.wait_until_received()


def _in_groups(weights: Iterable[tuple[str, torch.Tensor]], group_bytes: int) -> Iterator[dict[str, torch.Tensor]]:
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if name in group:
            raise ValueError(f"{name} is sent twice")
        group[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= group_bytes:
            yield group
            group, size = {}, 0
    if group:
        yield group


def _own_address(target: str) -> str:
    """The address of this machine from which a target is reached; nothing is sent."""
    host, _, port = target.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return probe.getsockname()[0]
