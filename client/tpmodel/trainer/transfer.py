"""How the tensors of an update go: in the order that was announced, or each behind its index."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from tpmodel.trainer.errors import WeightUpdateError
from tpmodel.trainer.gang import Gang, UpdateCall
from tpmodel.trainer.options import UpdateOptions
from tpmodel_worker.comm.communicator import Communicator, CommunicatorError
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.indexed import IndexedSender
from tpmodel_worker.weights.indexed_group import IndexedGroups
from tpmodel_worker.weights.packing import TensorInfo, describe, read_update, write_update

Progress = Callable[[int, int], None]
"""Called with bytes sent, and bytes of the whole update where they are known, else 0."""


_BEATS = 3
"""Signs of life in the time that a rank waits for one."""


class Transfer(Protocol):
    """The tensors of one update."""

    def send(self, tensors: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
        """Sends them. Raises ValueError where one does not fit, before any is sent, and WeightUpdateError."""
        ...

    def finish(self) -> None:
        """Returns once every gang has all that was sent. Raises ValueError where more is needed, WeightUpdateError."""
        ...

    def cancel(self) -> None:
        """Ends what is under way."""
        ...


def make_transfer(gangs: Sequence[Gang], group: Communicator | IndexedGroups, options: UpdateOptions) -> Transfer:
    """The one that the group was joined for."""
    if isinstance(group, IndexedGroups):
        return IndexedTransfer(gangs, group, options.deadline_seconds / _BEATS)
    return OrderedTransfer(gangs, group, options)


class OrderedTransfer:
    """Announces some tensors, and broadcasts them packed or one by one; then the next ones."""

    def __init__(self, gangs: Sequence[Gang], group: Communicator, options: UpdateOptions) -> None:
        self._gangs = gangs
        self._group = group
        self._options = options
        self._sent = 0

    def send(self, tensors: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
        """Returns once every rank has them."""
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

    def finish(self) -> None:
        """Nothing is under way."""

    def cancel(self) -> None:
        """Nothing is under way."""

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
            raise _failure(calls, error) from error
        for call in calls:
            call.wait_until_received()


class IndexedTransfer:
    """One call for the whole set, and an index before every tensor."""

    def __init__(self, gangs: Sequence[Gang], groups: IndexedGroups, heartbeat_seconds: float) -> None:
        """heartbeat_seconds: how often signs of life go out; less than the ranks' deadline."""
        self._gangs = gangs
        self._groups = groups
        self._heartbeat_seconds = heartbeat_seconds
        self._over = threading.Event()
        self._request = gangs[0].indexed_set()
        self._tensors = read_update(self._request)
        self._sender = IndexedSender(groups.data, self._tensors)
        self._calls: list[UpdateCall] = []
        self._missing = {tensor.name for tensor in self._tensors}
        self._total = sum(tensor.bytes for tensor in self._tensors)
        self._sent = 0

    def send(self, tensors: Mapping[str, torch.Tensor], progress: Progress | None) -> None:
        """Returns once they are on their way. Tied ones are left out."""
        infos = {info.name: info for info in self._tensors}
        for name, tensor in tensors.items():
            self._gangs[0].check(TensorInfo(name, describe(name, tensor).dtype, tuple(tensor.shape)))
        if not self._calls:
            self._calls = [gang.update(self._request, self._groups.abort) for gang in self._gangs]
            threading.Thread(target=self._beat, name="signs of life", daemon=True).start()
        for call in self._calls:
            call.wait_until_ready()
        for name, tensor in tensors.items():
            if name not in infos:
                continue
            try:
                self._sender.send(name, tensor)
            except CommunicatorError as error:
                raise _failure(self._calls, error) from error
            self._missing.discard(name)
            self._sent += infos[name].bytes
            if progress is not None:
                progress(self._sent, self._total)

    def finish(self) -> None:
        """Returns once every rank has the full set."""
        if self._missing:
            raise ValueError(
                f"{len(self._missing)} tensors of the set have not come, the first is {min(self._missing)}"
            )
        self._over.set()
        for call in self._calls:
            call.wait_until_received()

    def cancel(self) -> None:
        """Ends the calls."""
        self._over.set()
        for call in self._calls:
            call.cancel()

    def _beat(self) -> None:
        """While the tensors are still being made, the ranks hear that they will come."""
        while not self._over.wait(self._heartbeat_seconds):
            try:
                self._sender.heartbeat()
            except CommunicatorError:
                # Whoever sends the next tensor hears of it.
                return


def _failure(calls: Sequence[UpdateCall], error: Exception) -> WeightUpdateError:
    """What a gang has to say about it tells more."""
    failures = [call.error for call in calls if call.error is not None]
    return failures[0] if failures else WeightUpdateError("ABORTED", str(error))
