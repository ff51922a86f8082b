"""The gangs of a model as one sees them: what status remembers, joined with what exists."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from enum import Enum

from tpmodel_operator import clock, names
from tpmodel_operator.actions import WriteAttempt
from tpmodel_operator.api import GangStatus
from tpmodel_operator.observed import GangReport, Observed, Orders, PodRecord, StatefulSetRecord


class Existence(Enum):
    """Whether a gang is there."""

    PLANNED = "planned"
    """Written to status, its StatefulSet not seen yet: it may have been made, or be made by this pass."""
    LIVE = "live"
    LEAVING = "leaving"
    """Its StatefulSet is ending or gone, and pods are left."""
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gang:
    """One gang."""

    status: GangStatus
    """What the last pass remembered, brought in line with the StatefulSet that exists."""
    existence: Existence
    statefulset: StatefulSetRecord | None
    pods: tuple[PodRecord, ...]
    """By index."""
    known: Orders | None
    """What its ConfigMap says; None: it is not known to exist."""
    token_missing: bool
    report: GangReport | None

    @property
    def name(self) -> str:
        """Name of its StatefulSet."""
        return self.status.name

    def is_behind(self, status: GangStatus) -> bool:
        """Whether its ConfigMap does not say all that this status of it wants said."""
        known = self.known or Orders(attempt=0)
        return orders_of(status).over(known) != known

    @property
    def size(self) -> int:
        """Pods that it has when it is complete; 0 while that is unknown."""
        return self.statefulset.pods if self.statefulset else 0


def collect(observed: Observed) -> list[Gang]:
    """All gangs that status remembers or that exist, by name."""
    remembered = {gang.name: gang for gang in observed.model.status.gangs}
    statefulsets = {record.name: record for record in observed.statefulsets}
    pods: dict[str, list[PodRecord]] = defaultdict(list)
    for pod in observed.pods:
        if pod.gang in remembered or pod.gang in statefulsets or _is_name(observed.model.name, pod.gang):
            pods[pod.gang].append(pod)
    return [
        _gang(observed, name, remembered.get(name), statefulsets.get(name), pods.get(name, []))
        for name in sorted({*remembered, *statefulsets, *pods})
    ]


def _is_name(model: str, gang: str) -> bool:
    """Whether it can be a gang of the model: somebody may have written another label on a pod."""
    try:
        names.gang_of_name(model, gang)
    except ValueError:
        return False
    return True


def _gang(
    observed: Observed,
    name: str,
    remembered: GangStatus | None,
    statefulset: StatefulSetRecord | None,
    pods: list[PodRecord],
) -> Gang:
    known = observed.orders.get(name)
    return Gang(
        status=_status(observed.model.name, name, remembered, statefulset, known or Orders(attempt=1)),
        existence=_existence(remembered, statefulset, pods),
        statefulset=statefulset,
        pods=tuple(sorted(pods, key=lambda pod: (pod.index, pod.created))),
        known=known,
        token_missing=name in observed.tokens_missing,
        report=observed.reports.get(name),
    )


def _existence(
    remembered: GangStatus | None, statefulset: StatefulSetRecord | None, pods: list[PodRecord]
) -> Existence:
    if statefulset is not None:
        return Existence.LEAVING if statefulset.deleting else Existence.LIVE
    if remembered is not None and not remembered.uid and remembered.phase == "Pending":
        return Existence.PLANNED
    return Existence.LEAVING if pods else Existence.GONE


def _status(
    model: str, name: str, remembered: GangStatus | None, statefulset: StatefulSetRecord | None, known: Orders
) -> GangStatus:
    """What it was told is what status and the ConfigMap say together: either may have been lost."""
    told = _as_told(known)
    if remembered is not None:
        told = _as_told(orders_of(remembered).over(known))
        if statefulset is None or remembered.uid == statefulset.uid:
            return remembered.model_copy(update=told)
        if not remembered.uid:
            return remembered.model_copy(update=told | {"uid": statefulset.uid})
        # Made again under its name: nothing else that is remembered holds.
    if statefulset is None:
        index, revision = names.gang_of_name(model, name)
        return GangStatus(name=name, index=index, revision=revision).model_copy(update=told)
    fresh = GangStatus(
        name=name,
        index=statefulset.index,
        revision=statefulset.revision,
        uid=statefulset.uid,
        image=statefulset.image,
    )
    return fresh.model_copy(update=told)


def _as_told(orders: Orders) -> dict[str, object]:
    return {
        "attempt": orders.attempt,
        "rebuilds_requested": orders.rebuild,
        "model_revision": orders.model_revision,
        "weights_committed": orders.weights_version,
    }


def orders_of(status: GangStatus) -> Orders:
    """What a gang's pods are to be told."""
    return Orders(
        attempt=status.attempt,
        rebuild=status.rebuilds_requested,
        model_revision=status.model_revision,
        weights_version=status.weights_committed,
    )


def told(status: GangStatus) -> WriteAttempt:
    """Has the gang's pods told that."""
    return WriteAttempt(
        gang=status.name,
        attempt=status.attempt,
        rebuild=status.rebuilds_requested,
        model_revision=status.model_revision,
        weights_version=status.weights_committed,
    )


def is_current(report: GangReport, status: GangStatus) -> bool:
    """Whether the answer came from the gang's present attempt."""
    decided = clock.moment(status.last_restart.time) if status.last_restart is not None else None
    return status.restart is None and (decided is None or report.time > decided)
