"""What only the operator can refuse: condition Accepted=False with a reason and what to do about it.

Most mistakes never get here, since the API server checks the CRD's rules. Here is what needs the cluster or the
operator's settings, and what must hold whatever CRD is installed: a TPModel gives its author no more power over nodes
than its fields say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from tpmodel_operator import defaults
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.api_kubernetes import RESERVED_CONTAINER, VOLUME_SOURCES
from tpmodel_operator.names import LONGEST_MODEL_NAME
from tpmodel_operator.settings import OperatorSettings

MANY_NODES = frozenset({"ReadWriteMany", "ReadOnlyMany"})
WRITABLE = frozenset({"ReadWriteOnce", "ReadWriteOncePod", "ReadWriteMany"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a TPModel is not accepted."""

    reason: str
    """CamelCase, of the condition."""
    message: str
    """What is wrong, and what to write or do."""
    transient: bool = False
    """Whether it may pass without a change of the spec, so that looking again soon is worth it."""


def review(model: TPModel, *, volumes: Mapping[str, tuple[str, ...]], settings: OperatorSettings) -> Refusal | None:
    """The first refusal, or None.

    Args:
        model: the object.
        volumes: access modes of the PersistentVolumeClaims that exist, by name.
        settings: for the hostPath prefixes that are allowed.
    """
    return next(_refusals(model, volumes, settings), None)


def _refusals(model: TPModel, volumes: Mapping[str, tuple[str, ...]], settings: OperatorSettings) -> Iterator[Refusal]:
    spec = model.spec
    yield from _inconsistent(model)
    yield from _host_paths(spec, settings.allowed_host_paths)
    yield from _volumes(spec.pod_template.volumes)
    for sidecar in spec.pod_template.sidecars:
        yield from _sidecar(sidecar)
    yield from _claims(spec, volumes)


def _inconsistent(model: TPModel) -> Iterator[Refusal]:
    """What decisions and builders rely on, should the CRD that is installed not refuse it."""
    spec = model.spec
    if len(model.name) > LONGEST_MODEL_NAME:
        yield Refusal(
            reason="NameTooLong",
            message=f"metadata.name has {len(model.name)} characters: write at most {LONGEST_MODEL_NAME}",
        )
    try:
        defaults.model_location(spec.model.uri)
    except ValueError as error:
        yield Refusal(reason="UnknownModelSource", message=f"spec.model.uri: {error}")
    try:
        updates = defaults.updates_location(spec)
    except ValueError:
        updates = None
    if spec.weight_updates.persist_updates and (updates is None or updates.scheme not in ("pvc", "file")):
        yield Refusal(
            reason="UnknownUpdatesVolume",
            message=f"spec.weightUpdates.persistUpdates: {spec.weight_updates.persist_updates!r} is no volume: write "
            "pvc://claim/path or file:///path",
        )
    if spec.tensor_parallel_size % defaults.ranks_per_pod(spec):
        yield Refusal(
            reason="NotDivisible",
            message=f"tensorParallelSize {spec.tensor_parallel_size} is not divisible by ranksPerPod "
            f"{spec.ranks_per_pod}: write a ranksPerPod that divides it, or leave it out",
        )
    if spec.rollout.max_unavailable == spec.rollout.max_surge == 0:
        yield Refusal(
            reason="RolloutImpossible",
            message="rollout.maxUnavailable and rollout.maxSurge are both 0: write at least 1 for one of them",
        )


def _host_paths(spec: TPModelSpec, allowed: tuple[str, ...]) -> Iterator[Refusal]:
    location = defaults.model_location(spec.model.uri)
    if location.scheme == "file":
        yield from _host_path("spec.model.uri", location.path, allowed)
    if spec.cache.type == "hostPath":
        yield from _host_path("spec.cache.path", spec.cache.path, allowed)
    updates = defaults.updates_location(spec)
    if updates is not None and updates.scheme == "file":
        yield from _host_path("spec.weightUpdates.persistUpdates", updates.path, allowed)


def _host_path(field: str, path: str, allowed: tuple[str, ...]) -> Iterator[Refusal]:
    if any(_lies_under(path, prefix) for prefix in allowed):
        return
    offer = f"use a folder under {', '.join(allowed)}, or " if allowed else ""
    yield Refusal(
        reason="HostPathNotAllowed",
        message=f"{field}: folder {path} of the node is not under a prefix that this operator allows: {offer}"
        "use a PersistentVolumeClaim, or have the cluster's administrator add it to allowedHostPaths of the chart",
    )


def _lies_under(path: str, prefix: str) -> bool:
    """Whole parts are compared, so that /models-old is not under /models; `..` never lies under anything."""
    parts = PurePosixPath(path).parts
    return path.startswith("/") and ".." not in parts and PurePosixPath(path).is_relative_to(prefix)


def _volumes(volumes: list[dict[str, Any]]) -> Iterator[Refusal]:
    for volume in volumes:
        foreign = sorted(set(volume) - {"name", *VOLUME_SOURCES})
        if foreign:
            yield Refusal(
                reason="VolumeNotAllowed",
                message=f"spec.podTemplate.volumes: {foreign[0]} of volume {volume.get('name', '')!r} is not allowed: "
                f"use one of {', '.join(VOLUME_SOURCES)}",
            )


def _sidecar(sidecar: Mapping[str, Any]) -> Iterator[Refusal]:
    name = sidecar.get("name", "")
    if name == RESERVED_CONTAINER:
        yield Refusal(
            reason="SidecarNotAllowed", message=f"spec.podTemplate.sidecars: write another name than {name!r}"
        )
    problem = _privilege(sidecar)
    if problem:
        yield Refusal(
            reason="SidecarNotAllowed",
            message=f"spec.podTemplate.sidecars: {problem} of sidecar {name!r} is not allowed: leave it out",
        )


def _privilege(sidecar: Mapping[str, Any]) -> str:
    """What a sidecar asks for beyond Pod Security `restricted`, or nothing."""
    if any("hostPort" in port for port in sidecar.get("ports") or ()):
        return "hostPort"
    context: Mapping[str, Any] = sidecar.get("securityContext") or {}
    asked = {
        "privileged": bool(context.get("privileged")),
        "allowPrivilegeEscalation": bool(context.get("allowPrivilegeEscalation")),
        "runAsNonRoot: false": context.get("runAsNonRoot") is False,
        "runAsUser: 0": context.get("runAsUser") == 0,
        "procMount": context.get("procMount", "Default") != "Default",
        "capabilities.add": bool((context.get("capabilities") or {}).get("add")),
        "seccompProfile Unconfined": (context.get("seccompProfile") or {}).get("type") == "Unconfined",
    }
    return next((what for what, is_asked in asked.items() if is_asked), "")


def _claims(spec: TPModelSpec, volumes: Mapping[str, tuple[str, ...]]) -> Iterator[Refusal]:
    for claim in defaults.claims(spec):
        if claim not in volumes:
            yield Refusal(
                reason="ClaimNotFound",
                message=f"PersistentVolumeClaim {claim!r} does not exist in this namespace: create it, or correct its "
                "name in spec.model.uri, spec.cache.claimName or spec.weightUpdates.persistUpdates",
                transient=True,
            )
            continue
        yield from _access(spec, claim, frozenset(volumes[claim]))


def _access(spec: TPModelSpec, claim: str, modes: frozenset[str]) -> Iterator[Refusal]:
    pods = defaults.most_pods(spec)
    if pods > 1 and not modes & MANY_NODES:
        surge = " (a rollout's surge counts too)" if spec.rollout.max_surge else ""
        yield Refusal(
            reason="ClaimNotShareable",
            message=f"PersistentVolumeClaim {claim!r} is {_listed(modes)}, but up to {pods} pods need it{surge}: use a "
            "claim with access mode ReadWriteMany (or ReadOnlyMany for a model), or make it one pod: replicas 1, "
            "rollout.maxSurge 0, and ranksPerPod equal to tensorParallelSize",
        )
    field = defaults.written_claims(spec).get(claim)
    if field is not None and not modes & (WRITABLE if pods <= 1 else {"ReadWriteMany"}):
        needed = "ReadWriteMany" if pods > 1 else "ReadWriteOnce or ReadWriteMany"
        yield Refusal(
            reason="ClaimNotWritable",
            message=f"PersistentVolumeClaim {claim!r} is {_listed(modes)}, but pods write into {field}: use a claim "
            f"with access mode {needed}",
        )


def _listed(modes: frozenset[str]) -> str:
    return ", ".join(sorted(modes)) or "without access mode"
