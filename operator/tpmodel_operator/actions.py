"""What a pass decides: the status to write, then what is done, in this order; and what the user is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpmodel_operator.api import TPModelStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureModelChildren:
    """The model's Services, NetworkPolicy, ServiceAccount and PodDisruptionBudget are as the spec wants them.

    Part of every pass over an accepted spec; what was applied before, unchanged, need not be sent again.
    """

    disruptable_pods: int | None = None
    """Pods that evictions may take at the same time; None: there is to be no PodDisruptionBudget."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnsureGang:
    """A gang exists: its StatefulSet, and the Secret, ConfigMap and NetworkPolicy that this owns. What exists is left
    as it is."""

    name: str
    index: int
    revision: str
    image: str
    attempt: int
    rebuild: int = 0
    model_revision: str = ""
    weights_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteAttempt:
    """The gang's ConfigMap says at least this attempt, this many rebuilds and this version of the weights, which are
    never lowered, and the commit, where it is known."""

    gang: str
    attempt: int
    rebuild: int = 0
    model_revision: str = ""
    weights_version: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeletePod:
    """The pod with this UID begins to end; a pod of the same name with another UID is left alone."""

    name: str
    uid: str
    grace_seconds: int
    """0 only for a pod on a dead node, whose kubelet will confirm nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeleteGang:
    """The StatefulSet with this UID ends, so its pods drain, and what it owns goes with it."""

    name: str
    uid: str


Action = EnsureModelChildren | EnsureGang | WriteAttempt | DeletePod | DeleteGang


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A Kubernetes Event about the TPModel."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The outcome of one pass. The status is written first, so that a crash after it is finished by the next pass."""

    status: TPModelStatus
    actions: tuple[Action, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    """Seconds until time alone may change the decision; None: only a change can."""
