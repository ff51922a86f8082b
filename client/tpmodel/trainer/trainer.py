"""The trainer's side of live weight updates."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Literal, Self

import torch

from tpmodel.token_files import check_token
from tpmodel.trainer.discovery import Targets
from tpmodel.trainer.errors import GangsDifferError, UpdateOrderError, WeightUpdateError
from tpmodel.trainer.gang import Gang
from tpmodel.trainer.group import GangGroup
from tpmodel.trainer.membership import Membership
from tpmodel.trainer.options import Running, UpdateOptions
from tpmodel.trainer.transfer import Progress
from tpmodel.trainer.update import Update, Weights
from tpmodel.v1 import weights_pb2 as pb
from tpmodel_worker.weights.packing import TensorInfo, describe

Gangs = Literal["all_at_once", "one_by_one"]

_RUNNING = {
    "finish": pb.RUNNING_REQUESTS_FINISH,
    "keep": pb.RUNNING_REQUESTS_KEEP,
    "abort": pb.RUNNING_REQUESTS_ABORT,
}


def connect(
    targets: str | Sequence[str], *, token: str, options: UpdateOptions | Mapping[str, Any] | None = None
) -> Trainer:
    """Joins with the ranks of one gang or more.

    Args:
        targets: host:port of the control port of every gang's leader, or `dns:///host:port` for all gangs whose
            addresses the name has, in Kubernetes status.trainersUrl; gangs may then come and go between updates.
        token: the trainer's, which all the gangs know.
        options: the dataclass, or a dict of its fields.

    Raises:
        WeightUpdateError: a gang can't be reached or can't join.
        ValueError: the options, targets or token can't be, or the gangs are not alike.
    """
    trainer = Trainer(targets, check_token(token or ""), UpdateOptions.of(options))
    try:
        trainer.join()
    except BaseException:
        trainer.close()
        raise
    return trainer


class Trainer:
    """Sends the weights of one model to all ranks of its gangs. Not for several threads; a context manager."""

    def __init__(self, targets: str | Sequence[str], token: str, options: UpdateOptions) -> None:
        """Does nothing yet; use connect."""
        self.options = options
        self._token = token
        self._membership = Membership(Targets(targets), token, options)
        self._groups: list[GangGroup] = []
        self._joined = False
        self._closed = False
        self._update: Update | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _gangs(self) -> list[Gang]:
        return self._membership.gangs

    @property
    def targets(self) -> list[str]:
        """Control ports of the gangs, as found last."""
        return [gang.target for gang in self._gangs]

    @property
    def parameters(self) -> Mapping[str, pb.ParameterInfo]:
        """What a full set is made of, by name: shape, dtype and how the ranks split it."""
        return self._gangs[0].parameters

    def versions(self) -> list[int | None]:
        """What every gang serves, in the order of targets; None: nothing, its weights are not whole."""
        return [gang.version() for gang in self._gangs]

    def join(self) -> None:
        """Joins all gangs anew: after a failed update, or when a gang has lost a rank. Raises as connect."""
        self._refuse_while_updating()
        self._leave("the trainer joins anew")
        self._closed = False
        self._membership.find(anew=True)
        self._groups = [GangGroup(self._gangs, self._token, self.options)]
        self._joined = True

    @contextlib.contextmanager
    def update(self, version: int, *, running: Running = "keep") -> Iterator[Update]:
        """An update of all gangs that ends with finish where the block ends well, and with abort whatever else happens.

        Args:
            version: above every one before; 0 is the checkpoint.
            running: what becomes of requests that run: finish them first, keep them (they go on with the new
                weights behind the tokens that they have), or abort them.

        Raises:
            WeightUpdateError: a gang refused or failed. The message says what it serves now.
            UpdateOrderError: an update is under way, or the group has failed: join() first.
        """
        _check_version(version)
        self._check_order(running)
        self._reconcile()
        for gang in self._gangs:
            gang.check_version(version)
        with self._update_of(self._gangs, version, running) as update:
            yield update

    def send_weights(
        self,
        weights: Weights | Callable[[], Weights],
        *,
        version: int,
        running: Running = "keep",
        progress: Progress | None = None,
        gangs: Gangs = "all_at_once",
    ) -> None:
        """One whole update of every gang: start, all tensors, finish.

        Gangs that serve this version already are left out where others do not, so that an update which failed on the
        way is gone on with by sending it again.

        Args:
            weights: full tensors by their names in the checkpoint, on any device: a mapping, or pairs, which may be
                made as they are asked for, or a function that makes either.
            version: as in update.
            running: as in update.
            progress: hears of bytes sent, of each gang anew where they are updated one by one.
            gangs: all_at_once sends every byte once, to all of them. one_by_one updates one gang after the other, so
                that the others serve meanwhile; the first failure ends it. It needs the weights again for each gang.

        Raises: as update; GangsDifferError where there are several gangs; and ValueError for a tensor that the model
            does not have, before anything is sent.
        """
        _check_version(version)
        _check_weights(weights)
        self._check_order(running)
        if gangs not in ("all_at_once", "one_by_one"):
            raise ValueError(f"gangs is {gangs!r}: all_at_once or one_by_one")
        self._reconcile()
        if isinstance(weights, Mapping):
            self.check([describe(name, tensor) for name, tensor in weights.items()], full=True)
        due = self._due(version)
        parties = [due] if gangs == "all_at_once" else [[gang] for gang in due]
        if len(parties) > 1 and isinstance(weights, Iterator):
            raise ValueError(
                "one_by_one sends the weights to each gang in turn: give a mapping, a sequence, or a function that "
                "makes the pairs anew, no iterator"
            )
        try:
            for gang in due:
                gang.check_version(version)
            for party in parties:
                with self._update_of(party, version, running) as update:
                    update.send(weights() if callable(weights) else weights, progress)
        except WeightUpdateError as error:
            if len(self._gangs) == 1:
                raise
            raise GangsDifferError(error, version, self._membership.served()) from error

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
        """Ends what is under way, leaves the groups with all ranks, and closes the connections. Idempotent."""
        for group in self._groups:
            group.abort("the trainer is closed")
        self._groups = []
        self._joined, self._closed, self._update = False, True, None
        self._membership.close()

    # ------------------------------------------------------------------------------------------ one update

    @contextlib.contextmanager
    def _update_of(self, gangs: Sequence[Gang], version: int, running: Running) -> Iterator[Update]:
        group: GangGroup | None = None
        update: Update | None = None
        try:
            group, update = self._started(gangs, running)
            self._update = update
            yield update
            update.finish(version)
        except BaseException as error:
            self._joined = False
            if update is not None:
                update.cancel()
            if group is not None:
                self._drop(group, ": ".join(filter(None, (type(error).__name__, str(error)))))
            raise
        finally:
            self._update = None

    def _started(self, gangs: Sequence[Gang], running: Running) -> tuple[GangGroup, Update]:
        """A group of these gangs in which an update has begun."""
        group, is_new = self._group_of(gangs)
        while True:
            update = Update(group, self.options)
            try:
                update.start(_RUNNING[running])
            except BaseException as error:
                self._drop(group, f"{type(error).__name__}: {error}")
                stale = isinstance(error, WeightUpdateError) and error.code == "FAILED_PRECONDITION"
                if is_new or not stale or not self._membership.changing:
                    raise
                # A gang has a new world since the group was joined.
                group, is_new = self._group_of(gangs)
            else:
                return group, update

    def _group_of(self, gangs: Sequence[Gang]) -> tuple[GangGroup, bool]:
        """The group of exactly these gangs, and whether it was joined just now."""
        for group in self._groups:
            if group.gangs == tuple(gangs):
                return group, False
        for group in [group for group in self._groups if set(group.gangs) & set(gangs)]:
            # A gang is in one group at a time.
            self._groups.remove(group)
            group.leave("the trainer joins other groups")
        joined = GangGroup(gangs, self._token, self.options)
        self._groups.append(joined)
        return joined, True

    def _drop(self, group: GangGroup, reason: str) -> None:
        if group in self._groups:
            self._groups.remove(group)
            group.abort(reason)

    def _due(self, version: int) -> list[Gang]:
        """All gangs but those that serve the version already; all, where none would be left."""
        if len(self._gangs) == 1:
            return self._gangs
        return [gang for gang in self._gangs if gang.version() != version] or self._gangs

    def _check_order(self, running: Running) -> None:
        if running not in _RUNNING:
            raise ValueError(f"running is {running!r}: finish, keep or abort")
        self._refuse_while_updating()
        if not self._joined and (self._closed or not self._membership.changing):
            raise UpdateOrderError("the group is gone: join() first")

    def _refuse_while_updating(self) -> None:
        if self._update is not None:
            raise UpdateOrderError("an update is under way: finish or abort it first")

    # ---------------------------------------------------------------------------------------------- groups

    def _reconcile(self) -> None:
        """The gangs are those that there are now; groups with one that has gone are left."""
        if not self._membership.changing:
            return
        self._membership.find(anew=False)
        for group in [group for group in self._groups if not set(group.gangs) <= set(self._gangs)]:
            self._groups.remove(group)
            group.leave("a gang has gone")
        self._joined = True

    def _leave(self, reason: str) -> None:
        for group in self._groups:
            group.leave(reason)
        self._groups = []
        self._joined = False


def _check_version(version: Any) -> None:
    """In place, what is found at the end would leave the gang without whole weights."""
    if not isinstance(version, Integral) or int(version) >= 1 << 64:
        raise ValueError(f"version is {version!r}: a whole number")


def _check_weights(weights: Any) -> None:
    if isinstance(weights, torch.nn.Module) or not (callable(weights) or isinstance(weights, Iterable)):
        raise ValueError(
            f"weights is a {type(weights).__name__}: give a mapping such as model.state_dict(), pairs of name and "
            "tensor, or a function that makes either"
        )
