"""What decisions are made from: small records of the objects that exist, as the watches last saw them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from tpmodel_operator.api import TPModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerEnd:
    """How the worker's container last ended."""

    exit_code: int
    message: str = ""
    """The termination message: the cause, as the supervisor wrote it."""
    time: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodRecord:
    """One pod of a gang."""

    name: str
    uid: str
    namespace: str
    model: str
    gang: str
    index: int
    """Ordinal within the gang; 0 is the leader pod."""
    created: datetime
    changed: datetime
    """When its status last changed (scheduled, image pulled, container running, ready)."""
    deleting_since: datetime | None = None
    grace_seconds: int = 0
    node: str = ""
    ip: str = ""
    phase: str = "Pending"
    running: bool = False
    """Whether the worker's container runs."""
    ready: bool = False
    ready_changed: datetime | None = None
    waiting_reason: str = ""
    """Why the container does not run yet, such as ImagePullBackOff."""
    restart_count: int = 0
    ended: ContainerEnd | None = None
    """The newest end of the worker's container, in its present or its last state; None: it never ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatefulSetRecord:
    """One gang's StatefulSet."""

    name: str
    """The gang's name."""
    uid: str
    namespace: str
    model: str
    index: int
    revision: str
    pods: int
    image: str
    created: datetime
    deleting: bool = False
    weights_source: str = ""
    """Which checkpoint its versions count from; empty: an earlier operator has made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node that a pod of the model is bound to."""

    name: str
    ready: bool
    ready_changed: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a gang's ConfigMap tells its pods, which have it as files. Numbers only rise, a commit stays."""

    attempt: int
    rebuild: int = 0
    """How often its user has asked for a new world."""
    model_revision: str = ""
    """The commit that its rollout uses; empty while it is not known."""
    weights_version: int = 0
    """The version of the weights that it has committed, or is to have; 0: the checkpoint."""

    def over(self, earlier: Orders) -> Orders:
        """These orders, given to a gang that has earlier ones."""
        return Orders(
            attempt=max(self.attempt, earlier.attempt),
            rebuild=max(self.rebuild, earlier.rebuild),
            model_revision=self.model_revision or earlier.model_revision,
            weights_version=max(self.weights_version, earlier.weights_version),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedFault:
    """A fault of a world that served, as its engine saw it."""

    time: datetime
    epoch: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportedRebuild:
    """A world that took the place of one that was lost."""

    time: datetime
    """When the fault was detected."""
    epoch: int
    """The new world's."""
    kind: str
    """Of the fault."""
    seconds: float
    """From the detection to the new world's first step."""
    replayed_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GangReport:
    """GangStatus as the gang's leader pod answered it; never an input of a restart."""

    gang: str
    phase: str
    epoch: int
    ready_ranks: int
    load_percent: int
    time: datetime
    model_revision: str = ""
    """The commit that its model was resolved to, if it comes from a hub."""
    faults: tuple[ReportedFault, ...] = ()
    """The last ones, oldest first; of this engine only."""
    rebuilds: tuple[ReportedRebuild, ...] = ()
    """The same."""
    weights_version: int = 0
    """The last one that its engine knows to be committed."""
    weights_condition: str = ""
    """WeightsUpdating, WeightsIncomplete or WeightsLost; empty: nothing keeps its weights from being served."""
    weights_message: str = ""
    weights_kept: int = 0
    """The newest version that all its ranks have on a disk."""
    weights_keeping_error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """Everything that one pass over one TPModel decides from."""

    model: TPModel
    now: datetime
    statefulsets: tuple[StatefulSetRecord, ...] = ()
    pods: tuple[PodRecord, ...] = ()
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    """Nodes of pods that are being deleted, by name; a node that does not exist is absent."""
    orders: dict[str, Orders] = field(default_factory=dict)
    """What the gangs' ConfigMaps say, by gang."""
    reports: dict[str, GangReport] = field(default_factory=dict)
    """By gang; for status, and the commit that a model was first resolved to."""
    volumes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Access modes of the PersistentVolumeClaims that the spec names, by claim; a missing one is absent."""
    tokens_missing: frozenset[str] = frozenset()
    """Gangs whose token Secret is gone though a container may have read it: one restart, cause TokenLost. The Secret
    is made again after the status is written and before the actions; while a restart is under way it says nothing."""
    largest_node: int | None = None
    """GPUs of the largest node that the spec's nodeSelector chooses, for advice; None: not known."""
    conflicts: tuple[str, ...] = ()
    """Children that cannot be made since an object of that name belongs to somebody else, such as "Service chat"."""
