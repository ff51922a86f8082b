"""A TPModel as its status and its pods show it. Read from the API's JSON, whatever an operator left out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tpmodel.kubectl import names
from tpmodel.kubectl.pods import PodView, pod_view

Json = Mapping[str, Any]

_NO_OPERATOR = (
    "no operator has looked at it yet: is one running? "
    "kubectl get deployments -A -l app.kubernetes.io/name=tpmodel-operator"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionView:
    """One condition."""

    type: str
    status: str
    reason: str
    message: str
    since: str
    """RFC 3339."""

    @property
    def holds(self) -> bool:
        """Whether it is True."""
        return self.status == "True"

    @property
    def told(self) -> str:
        """Reason and message."""
        return f"{self.reason}: {self.message}" if self.message else self.reason


@dataclass(frozen=True, slots=True, kw_only=True)
class CauseView:
    """Why a gang was restarted, or is Failed."""

    cause: str
    message: str
    exit_code: int | None
    time: str
    attempt: int = 0
    """The one that a restart began."""
    reason: str = ""
    """Of a failure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultView:
    """A fault of a gang's world."""

    time: str
    epoch: int
    kind: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RebuildView:
    """A world that was rebuilt in place."""

    time: str
    epoch: int
    kind: str
    milliseconds: int
    replayed_requests: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GangView:
    """One gang and the pods that carry its label."""

    name: str
    index: int
    revision: str
    attempt: int
    epoch: int
    phase: str
    ready: bool
    ready_ranks: int
    load_percent: int
    restarts: int
    """All since it was made."""
    restarts_counted: int
    """Those that count against recovery.maxRestarts."""
    last_restart: CauseView | None
    restart_not_before: str
    """End of the backoff before the restart under way; empty: there is none."""
    failure: CauseView | None
    pods: tuple[PodView, ...]
    uid: str = ""
    """Of its StatefulSet."""
    warning: str = ""
    """The newest Event about its StatefulSet, where there are no pods."""
    faults: tuple[FaultView, ...] = ()
    """The last ones, oldest first."""
    rebuilds: tuple[RebuildView, ...] = ()
    """The same."""
    weights_version: int | None = None
    """What it serves, 0: the checkpoint; None: nothing, or not known."""
    weights_condition: str = ""
    """Why its weights are not served: one CamelCase word."""
    weights_message: str = ""
    weights_kept: int = 0
    """The newest version on its volume for updates; 0: none."""
    weights_keeping_error: str = ""

    @property
    def leader(self) -> PodView | None:
        """Its leader pod, if it can be reached: ready and not ending."""
        return next((pod for pod in self.pods if pod.index == 0 and pod.ready and not pod.deleting), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelView:
    """One TPModel."""

    name: str
    namespace: str
    uri: str
    tensor_parallel_size: int
    replicas: int
    """Gangs wanted."""
    max_restarts: int
    ready: str
    """Such as 1/2."""
    state: str
    restarts: int
    url: str
    image: str
    created: str
    generation: int
    observed_generation: int
    conditions: tuple[ConditionView, ...] = ()
    gangs: tuple[GangView, ...] = ()
    api_key: str = ""
    """Where the key is that clients need, such as key token of Secret keys; empty: they need none."""
    trainers_url: str = ""
    """What trainers dial; empty: it takes no weight updates."""

    @property
    def full_name(self) -> str:
        """With its namespace."""
        return f"{self.namespace}/{self.name}"

    @property
    def unseen(self) -> str:
        """Why status says nothing of the spec as it is now; empty: it does."""
        if not self.observed_generation:
            return _NO_OPERATOR
        if self.observed_generation < self.generation:
            return f"the operator has not looked at generation {self.generation} yet, what follows is older"
        return ""

    @property
    def problem(self) -> str:
        """Why not all gangs serve, the gravest reason first; empty: they do."""
        conditions = {condition.type: condition for condition in self.conditions}
        for kind, bad in (("Accepted", "False"), ("Stalled", "True"), ("Degraded", "True"), ("Progressing", "True")):
            condition = conditions.get(kind)
            if condition is not None and condition.status == bad:
                return condition.told
        ready = conditions.get("Ready")
        if ready is None:
            return self.unseen
        return "" if ready.holds else ready.told


def model_view(model: Json, pods: Iterable[Json] = ()) -> ModelView:
    """From `kubectl get` of a TPModel and of the pods with its label."""
    metadata, spec, status = model["metadata"], model.get("spec", {}), model.get("status") or {}
    key = spec.get("auth", {}).get("apiKey")
    return ModelView(
        name=metadata["name"],
        namespace=metadata.get("namespace", "default"),
        uri=spec.get("model", {}).get("uri", ""),
        tensor_parallel_size=spec.get("tensorParallelSize", 1),
        replicas=spec.get("replicas", 1),
        max_restarts=spec.get("recovery", {}).get("maxRestarts", 0),
        ready=status.get("ready", ""),
        state=status.get("state", ""),
        restarts=status.get("restarts", 0),
        url=status.get("url", ""),
        trainers_url=status.get("trainersUrl", ""),
        image=status.get("image", ""),
        created=metadata.get("creationTimestamp", ""),
        generation=metadata.get("generation", 0),
        observed_generation=status.get("observedGeneration", 0),
        conditions=tuple(_condition(condition) for condition in status.get("conditions", [])),
        gangs=_gangs(status.get("gangs", []), [pod_view(pod) for pod in pods]),
        api_key=f"key {key['key']} of Secret {key['name']}" if key else "",
    )


def _gangs(gangs: Iterable[Json], pods: Iterable[PodView]) -> tuple[GangView, ...]:
    """Those that status knows; and such as only pods tell of, while no operator runs."""
    by_gang: dict[str, list[PodView]] = {}
    for pod in sorted(pods, key=lambda pod: (pod.index, pod.deleting, pod.name)):
        by_gang.setdefault(pod.gang, []).append(pod)
    known = [_gang(gang, by_gang.pop(gang["name"], [])) for gang in gangs]
    return (*known, *(_gang({"name": name, "phase": "Unknown"}, found) for name, found in sorted(by_gang.items())))


def _gang(gang: Json, pods: Iterable[PodView]) -> GangView:
    restart, last, failure = gang.get("restart") or {}, gang.get("lastRestart"), gang.get("failure")
    return GangView(
        name=gang["name"],
        index=gang.get("index", _index_of(gang["name"])),
        revision=gang.get("revision", ""),
        attempt=gang.get("attempt", 1),
        epoch=gang.get("epoch", 0),
        phase=gang.get("phase", "Pending"),
        ready=gang.get("ready", False),
        ready_ranks=gang.get("readyRanks", 0),
        load_percent=gang.get("loadPercent", 0),
        restarts=gang.get("restartsTotal", 0),
        restarts_counted=gang.get("restarts", 0),
        last_restart=_cause(last) if last else None,
        restart_not_before="" if restart.get("began") else restart.get("notBefore", ""),
        failure=_cause(failure) if failure else None,
        pods=tuple(pods),
        uid=gang.get("uid", ""),
        faults=tuple(map(_fault, gang.get("faults", []))),
        rebuilds=tuple(map(_rebuild, gang.get("rebuilds", []))),
        weights_version=gang.get("weightsVersion"),
        weights_condition=gang.get("weightsCondition", ""),
        weights_message=" ".join(gang.get("weightsMessage", "").split()),
        weights_kept=gang.get("weightsKept", 0),
        weights_keeping_error=" ".join(gang.get("weightsKeepingError", "").split()),
    )


def _index_of(gang: str) -> int:
    """Out of <model>-<index>-<revision>."""
    index = gang.rsplit("-", 2)[-2] if gang.count("-") >= 2 else ""
    return int(index) if index.isdecimal() else -1


def _cause(entry: Json) -> CauseView:
    return CauseView(
        cause=entry.get("cause", ""),
        message=" ".join(entry.get("message", "").split()),
        exit_code=entry.get("exitCode"),
        time=entry.get("time", ""),
        attempt=entry.get("attempt", 0),
        reason=entry.get("reason", ""),
    )


def _fault(entry: Json) -> FaultView:
    message = " ".join(entry.get("message", "").split())
    return FaultView(time=entry["time"], epoch=entry["epoch"], kind=entry["kind"], message=message)


def _rebuild(entry: Json) -> RebuildView:
    return RebuildView(
        time=entry["time"],
        epoch=entry["epoch"],
        kind=entry["kind"],
        milliseconds=entry["milliseconds"],
        replayed_requests=entry.get("replayedRequests", 0),
    )


def _condition(entry: Json) -> ConditionView:
    return ConditionView(
        type=entry["type"],
        status=entry["status"],
        reason=entry.get("reason", ""),
        message=" ".join(entry.get("message", "").split()),
        since=entry.get("lastTransitionTime", ""),
    )


def pod_selector(model: str, gang: str = "") -> str:
    """Label selector of a model's pods, or of one gang's."""
    return f"{names.MODEL_LABEL}={model}" + (f",{names.GANG_LABEL}={gang}" if gang else "")
