"""A cluster as the operator's decisions see it: objects, a clock, and the controllers and kubelets that move them.

Nothing happens by itself: tests call what happens, one thing after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tpmodel_operator import defaults, gang, names, weights
from tpmodel_operator.actions import (
    Action,
    Decision,
    DeleteGang,
    DeletePod,
    EnsureGang,
    EnsureModelChildren,
    Event,
    WriteAttempt,
)
from tpmodel_operator.api import GangStatus, TPModel, TPModelSpec, TPModelStatus
from tpmodel_operator.observed import (
    ContainerEnd,
    GangReport,
    NodeRecord,
    Observed,
    Orders,
    PodRecord,
    StatefulSetRecord,
)
from tpmodel_operator.settings import OperatorSettings

START = datetime(2026, 1, 1, tzinfo=UTC)
IMAGE = "registry.example/worker:1"


def spec_with(**changes: Any) -> TPModelSpec:
    """A model of 2 pods a gang and mode Restart, with changes in Python's or YAML's names."""
    given: dict[str, Any] = {
        "model": {"uri": "hf://organisation/model"},
        "tensorParallelSize": 2,
        "ranksPerPod": 1,
        "device": "cpu",
    }
    recovery = {"mode": "Restart"} | changes.pop("recovery", {})
    return TPModelSpec.model_validate(given | changes | {"recovery": recovery})


@dataclass
class Cluster:
    """One TPModel and what belongs to it."""

    spec: TPModelSpec = field(default_factory=spec_with)
    name: str = "m"
    settings: OperatorSettings = field(default_factory=lambda: OperatorSettings(default_image=IMAGE))
    now: datetime = START
    generation: int = 1
    annotations: dict[str, str] = field(default_factory=dict)
    deleting: bool = False
    status: TPModelStatus = field(default_factory=TPModelStatus)
    statefulsets: dict[str, StatefulSetRecord] = field(default_factory=dict)
    pods: dict[str, PodRecord] = field(default_factory=dict)
    """By UID."""
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    """What the gangs' ConfigMaps say, and the same of commits."""
    commits: dict[str, str] = field(default_factory=dict)
    rebuilds: dict[str, int] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    reports: dict[str, GangReport] = field(default_factory=dict)
    tokens_missing: set[str] = field(default_factory=set)
    volumes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    largest_node: int | None = None
    budget: int | None = None
    events: list[Event] = field(default_factory=list)
    deletions: list[DeletePod] = field(default_factory=list)
    made: int = 0
    """Objects made so far: the next UID."""

    # ------------------------------------------------------------------------------------------------ operator

    def observed(self) -> Observed:
        """What an operator sees now."""
        model = TPModel(
            name=self.name,
            namespace="space",
            uid="model-uid",
            generation=self.generation,
            deleting=self.deleting,
            annotations=self.annotations,
            spec=self.spec,
            status=self.status,
        )
        return Observed(
            model=model,
            now=self.now,
            statefulsets=tuple(self.statefulsets.values()),
            pods=tuple(self.pods.values()),
            nodes={name: node for name, node in self.nodes.items() if self._is_of_interest(name)},
            orders={name: self._orders(name) for name in self.attempts},
            reports=self.reports,
            tokens_missing=frozenset(self.tokens_missing),
            volumes=self.volumes,
            largest_node=self.largest_node,
        )

    def decide(self) -> Decision:
        """One decision, of which nothing is carried out."""
        return gang.decide(self.observed(), self.settings)

    def reconcile(self) -> Decision:
        """One whole pass: decision, status, actions."""
        decision = self.decide()
        self.status = TPModelStatus.model_validate_json(decision.status.model_dump_json(by_alias=True))
        self.tokens_missing.clear()
        for action in decision.actions:
            self.carry_out(action)
        self.events += decision.events
        return decision

    def settle(self, passes: int = 20) -> Decision:
        """Passes, with every pod starting, until nothing changes."""
        for _ in range(passes):
            before = (self.status, dict(self.pods), dict(self.statefulsets))
            decision = self.reconcile()
            self.statefulset_controller()
            self.end_pods()
            self.start_pods()
            if before == (self.status, self.pods, self.statefulsets):
                return decision
        raise AssertionError(f"still moving after {passes} passes: {self.status.state}")

    def carry_out(self, action: Action) -> None:
        """What the API server makes of an action."""
        match action:
            case EnsureModelChildren():
                self.budget = action.disruptable_pods
            case EnsureGang():
                self._ensure(action)
            case WriteAttempt():
                self.attempts[action.gang] = max(action.attempt, self.attempts.get(action.gang, 0))
                self._tell_commit(action.gang, action.model_revision)
                self.rebuilds[action.gang] = max(action.rebuild, self.rebuilds.get(action.gang, 0))
                self.weights[action.gang] = max(action.weights_version, self.weights.get(action.gang, 0))
            case DeletePod():
                self.deletions.append(action)
                self.delete_pod(action.uid, action.grace_seconds)
            case DeleteGang():
                self._delete_gang(action)

    # ------------------------------------------------------------------------------------- controllers, kubelets

    def statefulset_controller(self) -> None:
        """Makes missing pods of every StatefulSet."""
        for statefulset in self.statefulsets.values():
            present = {pod.index for pod in self.pods.values() if pod.gang == statefulset.name}
            for index in sorted(set(range(statefulset.pods)) - present):
                if not statefulset.deleting:
                    self._make_pod(statefulset, index)

    def start_pods(self, *, ready: bool = True) -> None:
        """Every pod that is not ending runs, and is Ready if it has that to be."""
        for pod in list(self.pods.values()):
            if pod.deleting_since is None and self._node_ready(pod) and not (pod.running and pod.ready == ready):
                self.change(pod, running=True, ready=ready, phase="Running", ready_changed=self.now)

    def end_pods(self) -> None:
        """Every pod that is ending is gone, but on nodes that are dead."""
        for pod in list(self.pods.values()):
            if pod.deleting_since is not None and self._node_ready(pod):
                del self.pods[pod.uid]

    def delete_pod(self, uid: str, grace_seconds: int = 135) -> None:
        """A DELETE with a UID precondition."""
        pod = self.pods.get(uid)
        if pod is None:
            return
        if grace_seconds == 0:
            del self.pods[uid]
        elif pod.deleting_since is None or grace_seconds < pod.grace_seconds:
            self.pods[uid] = replace(pod, deleting_since=self.now, grace_seconds=grace_seconds, changed=self.now)

    def end_container(self, pod: PodRecord, exit_code: int, message: str = "") -> None:
        """The worker's container ends; the kubelet has not started it again yet."""
        end = ContainerEnd(exit_code=exit_code, message=message, time=self.now)
        self.change(pod, running=False, ready=False, ended=end, ready_changed=self.now)

    def restart_container(self, pod: PodRecord) -> None:
        """The kubelet starts the container again."""
        pod = self.pods[pod.uid]
        self.change(pod, running=True, restart_count=pod.restart_count + 1)

    def change(self, pod: PodRecord, **fields: Any) -> PodRecord:
        """The pod's status changes."""
        self.pods[pod.uid] = replace(self.pods[pod.uid], changed=self.now, **fields)
        return self.pods[pod.uid]

    def fail_node(self, name: str) -> None:
        """The node is not Ready from now on."""
        self.nodes[name] = NodeRecord(name=name, ready=False, ready_changed=self.now)

    # -------------------------------------------------------------------------------------------------- the user

    def edit(self, **changes: Any) -> None:
        """The user applies the spec with changes."""
        self.spec = self.spec.model_copy(update=changes)
        self.generation += 1

    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now += timedelta(seconds=seconds)

    # --------------------------------------------------------------------------------------------------- looking

    def gang_status(self, index: int = 0) -> GangStatus:
        """Of the gang with this index, the only one."""
        (found,) = (entry for entry in self.status.gangs if entry.index == index)
        return found

    def pod(self, index: int, gang_index: int = 0) -> PodRecord:
        """The one pod of this index."""
        (found,) = (
            pod
            for pod in self.pods.values()
            if pod.index == index and names.gang_of_name(self.name, pod.gang)[0] == gang_index
        )
        return found

    def condition(self, kind: str) -> tuple[str, str]:
        """Status and reason."""
        found = next(condition for condition in self.status.conditions if condition.type == kind)
        return found.status, found.reason

    def reasons(self) -> list[str]:
        """Of the events so far."""
        return [event.reason for event in self.events]

    # -------------------------------------------------------------------------------------------------- privates

    def _uid(self) -> str:
        self.made += 1
        return f"uid-{self.made}"

    def _ensure(self, action: EnsureGang) -> None:
        self.attempts.setdefault(action.name, action.attempt)
        self._tell_commit(action.name, action.model_revision)
        self.weights.setdefault(action.name, action.weights_version)
        if action.name not in self.statefulsets:
            self.statefulsets[action.name] = StatefulSetRecord(
                name=action.name,
                uid=self._uid(),
                namespace="space",
                model=self.name,
                index=action.index,
                revision=action.revision,
                pods=defaults.pods_per_gang(self.spec),
                image=action.image,
                created=self.now,
                weights_source=weights.source(self.observed().model),
            )

    def _orders(self, gang: str) -> Orders:
        return Orders(
            attempt=self.attempts[gang],
            rebuild=self.rebuilds.get(gang, 0),
            model_revision=self.commits.get(gang, ""),
            weights_version=self.weights.get(gang, 0),
        )

    def _tell_commit(self, gang: str, commit: str) -> None:
        if commit:
            self.commits[gang] = commit

    def _delete_gang(self, action: DeleteGang) -> None:
        statefulset = self.statefulsets.get(action.name)
        if statefulset is not None and statefulset.uid == action.uid:
            del self.statefulsets[action.name]
            for pod in list(self.pods.values()):
                if pod.gang == action.name:
                    self.delete_pod(pod.uid)
        self.attempts.pop(action.name, None)
        self.commits.pop(action.name, None)
        self.rebuilds.pop(action.name, None)
        self.weights.pop(action.name, None)

    def _make_pod(self, statefulset: StatefulSetRecord, index: int) -> None:
        uid = self._uid()
        node = f"node-{index}"
        self.nodes.setdefault(node, NodeRecord(name=node, ready=True))
        self.pods[uid] = PodRecord(
            name=f"{statefulset.name}-{index}",
            uid=uid,
            namespace="space",
            model=self.name,
            gang=statefulset.name,
            index=index,
            created=self.now,
            changed=self.now,
            node=node,
        )

    def _node_ready(self, pod: PodRecord) -> bool:
        return self.nodes[pod.node].ready

    def _is_of_interest(self, node: str) -> bool:
        return any(pod.node == node and pod.deleting_since is not None for pod in self.pods.values())


def serving(**changes: Any) -> Cluster:
    """A cluster whose gangs are all Ready."""
    cluster = Cluster(spec=spec_with(**changes))
    cluster.settle()
    return cluster
