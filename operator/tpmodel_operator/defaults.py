"""What a TPModel means where it leaves something out. Pure functions of the spec: nodes are never asked."""

from __future__ import annotations

from typing import Literal, NamedTuple

from tpmodel_operator.api import TPModelSpec

DEFAULT_GPU_RESOURCE = "nvidia.com/gpu"
MOST_RANKS_PER_POD = 8
"""GPUs of a common host; more only where the spec says so."""

Scheme = Literal["hf", "pvc", "file", "oci"]


class ModelLocation(NamedTuple):
    """spec.model.uri in its parts."""

    scheme: Scheme
    name: str
    """Of the repository (hf), claim (pvc) or image (oci); empty for file."""
    path: str
    """Of the checkpoint's folder: within the claim (pvc, empty: its root), or on the node (file)."""


def ranks_per_pod(spec: TPModelSpec) -> int:
    """Ranks, and with device cuda GPUs, in each pod of a gang.

    GPUs of one host belong in one pod: between pods of one host NCCL cannot use NVLink. On cpu small pods are easier
    to place, and shared memory makes no such difference.
    """
    if spec.ranks_per_pod is not None:
        return spec.ranks_per_pod
    if spec.device == "cpu":
        return 1
    size = spec.tensor_parallel_size
    return max(ranks for ranks in range(1, MOST_RANKS_PER_POD + 1) if size % ranks == 0)


def pods_per_gang(spec: TPModelSpec) -> int:
    """Pods that serve one copy of the model together."""
    return spec.tensor_parallel_size // ranks_per_pod(spec)


def most_pods(spec: TPModelSpec) -> int:
    """Pods of the whole TPModel at its busiest: while a rollout has its surge."""
    return (spec.replicas + spec.rollout.max_surge) * pods_per_gang(spec)


def gpu_resource(spec: TPModelSpec) -> str:
    """The extended resource that each rank needs one of; empty where ranks need none or claims give the GPUs."""
    if spec.device == "cpu" or spec.resource_claims:
        return ""
    return spec.gpu_resource_name or DEFAULT_GPU_RESOURCE


def model_location(uri: str) -> ModelLocation:
    """The parts of a model's uri; ValueError where it is none that the CRD accepts."""
    scheme, separator, rest = uri.partition("://")
    if separator and rest:
        match scheme:
            case "hf" | "oci":
                return ModelLocation(scheme, rest, "")
            case "pvc":
                claim, _, path = rest.partition("/")
                return ModelLocation("pvc", claim, path.strip("/"))
            case "file":
                return ModelLocation("file", "", "/" + rest.strip("/"))
            case _:
                pass
    raise ValueError(
        f"{uri!r} is no model: write hf://organisation/name, pvc://claim/path, file:///path or oci://image"
    )


def served_name(spec: TPModelSpec) -> str:
    """The model's name in the APIs: as written, else the last part of its uri."""
    if spec.model.served_name:
        return spec.model.served_name
    location = model_location(spec.model.uri)
    if location.scheme == "hf":
        return location.name
    if location.scheme == "oci":
        repository = location.name.partition("@")[0]
        return repository.rpartition("/")[2].partition(":")[0]
    return location.path.rpartition("/")[2] or location.name


def updates_location(spec: TPModelSpec) -> ModelLocation | None:
    """Where committed weights are kept, a pvc or a file; None: nowhere."""
    uri = spec.weight_updates.persist_updates
    return model_location(uri) if uri else None


def claims(spec: TPModelSpec) -> tuple[str, ...]:
    """The PersistentVolumeClaims that all pods mount: the model's, and those that they write into."""
    location = model_location(spec.model.uri)
    model = [location.name] if location.scheme == "pvc" else []
    return tuple(dict.fromkeys([*model, *written_claims(spec)]))


def written_claims(spec: TPModelSpec) -> dict[str, str]:
    """The PersistentVolumeClaims that pods write into, and the field that names each."""
    updates = updates_location(spec)
    found = {updates.name: "spec.weightUpdates.persistUpdates"} if updates and updates.scheme == "pvc" else {}
    return found | ({spec.cache.claim_name: "spec.cache"} if spec.cache.type == "pvc" else {})
