"""What a trainer does between start and finish."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch

from tpmodel.trainer.errors import UpdateOrderError
from tpmodel.trainer.group import GangGroup
from tpmodel.trainer.options import UpdateOptions
from tpmodel.trainer.transfer import Progress, make_transfer
from tpmodel.v1 import weights_pb2 as pb

Weights = Mapping[str, torch.Tensor] | Iterator[tuple[str, torch.Tensor]] | Sequence[tuple[str, torch.Tensor]]
_FINISH_SECONDS = 3600.0


class Update:
    """What is between start and finish. Use Trainer.update."""

    def __init__(self, group: GangGroup, options: UpdateOptions) -> None:
        self._gangs = group.gangs
        self._options = options
        self._transfer = make_transfer(group.gangs, group.communicator, options)
        self._started = False

    def send(self, weights: Weights, progress: Progress | None = None) -> None:
        """Sends tensors in order; may be called more than once.

        The tensors may be changed once it returns.

        Raises:
            ValueError: a tensor does not fit the model; nothing of its group was sent.
            WeightUpdateError: a gang failed.
        """
        if not self._started:
            raise UpdateOrderError("the update has not started, or is over")
        if isinstance(weights, Mapping):
            self._transfer.send(weights, progress)
            return
        for group in _in_groups(weights, self._options.group_bytes):
            self._transfer.send(group, progress)

    def start(self, running: pb.RunningRequests.ValueType) -> None:
        """Every gang pauses, or makes room. Trainer.update calls it."""
        for gang in self._gangs:
            gang.start(running, _FINISH_SECONDS)
        self._started = True

    def finish(self, version: int) -> None:
        """Every gang commits. Trainer.update calls it."""
        self._started = False
        self._transfer.finish()
        for gang in self._gangs:
            gang.finish(version)

    def cancel(self) -> None:
        """Ends what is under way. Trainer.update calls it."""
        self._started = False
        self._transfer.cancel()


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
