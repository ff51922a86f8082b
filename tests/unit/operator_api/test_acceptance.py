"""What the operator refuses that the API server cannot see."""

from __future__ import annotations

from typing import Any

import pytest

from tpmodel_operator.acceptance import Refusal, review
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.settings import OperatorSettings

HUB = "hf://organisation/name"


def reviewed(
    uri: str = HUB, *, claims: dict[str, tuple[str, ...]] | None = None, allowed: tuple[str, ...] = (), **fields: Any
) -> Refusal | None:
    spec = TPModelSpec.model_validate({"model": {"uri": uri}, "device": "cpu"} | fields)
    model = TPModel(name="m", namespace="n", uid="u", generation=1, spec=spec)
    settings = OperatorSettings(default_image="worker:1", allowed_host_paths=allowed)
    return review(model, volumes=claims or {}, settings=settings)


def reason(refusal: Refusal | None) -> str:
    return refusal.reason if refusal else ""


def test_a_plain_model_is_accepted() -> None:
    assert reviewed() is None


# ------------------------------------------------------------------------------------------------------ claims


def test_a_claim_that_does_not_exist_is_looked_at_again() -> None:
    refusal = reviewed("pvc://models/x")
    assert refusal is not None
    assert (refusal.reason, refusal.transient) == ("ClaimNotFound", True)
    assert "'models'" in refusal.message


@pytest.mark.parametrize(
    "fields",
    [
        {"tensorParallelSize": 2},
        {"replicas": 2},
        {"rollout": {"maxSurge": 1}},
    ],
)
@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod"])
def test_one_node_claim_with_several_pods_is_refused_with_the_remedy(mode: str, fields: dict[str, Any]) -> None:
    refusal = reviewed("pvc://models/x", claims={"models": (mode,)}, **fields)
    assert refusal is not None
    assert refusal.reason == "ClaimNotShareable"
    assert f"'models' is {mode}, but up to 2 pods need it" in refusal.message
    assert "ReadWriteMany" in refusal.message


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod", "ReadOnlyMany", "ReadWriteMany"])
def test_any_claim_serves_one_pod_of_a_model(mode: str) -> None:
    assert reviewed("pvc://models/x", claims={"models": (mode,)}, tensorParallelSize=2, ranksPerPod=2) is None


@pytest.mark.parametrize("mode", ["ReadOnlyMany", "ReadWriteMany"])
def test_a_shareable_claim_serves_many_pods_of_a_model(mode: str) -> None:
    assert reviewed("pvc://models/x", claims={"models": ("ReadWriteOnce", mode)}, replicas=3) is None


@pytest.mark.parametrize(
    ("modes", "replicas", "expected"),
    [
        (("ReadWriteMany",), 2, ""),
        (("ReadWriteOnce",), 1, ""),
        (("ReadOnlyMany",), 1, "ClaimNotWritable"),
        (("ReadOnlyMany", "ReadWriteOnce"), 2, "ClaimNotWritable"),
        (("ReadWriteOnce",), 2, "ClaimNotShareable"),
    ],
)
def test_a_cache_needs_a_claim_that_its_pods_can_write(modes: tuple[str, ...], replicas: int, expected: str) -> None:
    cache = {"type": "pvc", "claimName": "cache"}
    assert reason(reviewed(cache=cache, claims={"cache": modes}, replicas=replicas)) == expected


def test_updates_are_kept_in_a_claim_that_pods_can_write() -> None:
    updates = {"persistUpdates": "pvc://sets/a"}
    assert reason(reviewed(weightUpdates=updates)) == "ClaimNotFound"
    refusal = reviewed(weightUpdates=updates, claims={"sets": ("ReadOnlyMany",)})
    assert refusal is not None
    assert refusal.reason == "ClaimNotWritable"
    assert "pods write into spec.weightUpdates.persistUpdates" in refusal.message
    assert (
        reason(reviewed(weightUpdates=updates, claims={"sets": ("ReadWriteOnce",)}, replicas=2)) == "ClaimNotShareable"
    )
    assert reviewed(weightUpdates=updates, claims={"sets": ("ReadWriteMany",)}, replicas=2) is None


def test_updates_are_kept_on_nodes_under_allowed_prefixes_only() -> None:
    updates = {"persistUpdates": "file:///sets"}
    refusal = reviewed(weightUpdates=updates)
    assert refusal is not None
    assert refusal.message.startswith("spec.weightUpdates.persistUpdates: folder /sets of the node")
    assert reviewed(weightUpdates=updates, allowed=("/sets",)) is None


@pytest.mark.parametrize("uri", ["hf://a/b", "/sets"])
def test_updates_are_kept_in_a_volume(uri: str) -> None:
    assert reason(reviewed(weightUpdates={"persistUpdates": uri})) == "UnknownUpdatesVolume"


# --------------------------------------------------------------------------------------------------- hostPaths


def test_hostpath_is_refused_where_no_prefix_is_allowed() -> None:
    refusal = reviewed("file:///var/lib/models/x")
    assert refusal is not None
    assert refusal.reason == "HostPathNotAllowed"
    assert "spec.model.uri: folder /var/lib/models/x of the node" in refusal.message
    assert "allowedHostPaths" in refusal.message


@pytest.mark.parametrize(
    ("path", "accepted"),
    [
        ("/models", True),
        ("/models/", True),
        ("/models/a/b", True),
        ("/models-old/a", False),
        ("/mod", False),
        ("/models/../etc", False),
        ("/models/a/../../etc", False),
        ("/", False),
        ("//models/a", False),
        ("models/a", False),
    ],
)
def test_prefixes_are_compared_part_by_part(path: str, *, accepted: bool) -> None:
    refusal = reviewed(cache={"type": "hostPath", "path": path}, allowed=("/models",))
    assert reason(refusal) == ("" if accepted else "HostPathNotAllowed")


def test_the_message_offers_the_prefixes_that_are_allowed() -> None:
    refusal = reviewed(cache={"type": "hostPath", "path": "/x"}, allowed=("/models", "/cache"))
    assert refusal is not None
    assert "use a folder under /models, /cache" in refusal.message


def test_a_prefix_may_be_written_with_a_slash_at_its_end() -> None:
    assert reviewed("file:///models/x", allowed=("/models/",)) is None


def test_every_path_must_be_allowed() -> None:
    cache = {"type": "hostPath", "path": "/elsewhere"}
    refusal = reviewed("file:///models/x", allowed=("/models",), cache=cache)
    assert refusal is not None
    assert refusal.message.startswith("spec.cache.path")


# ------------------------------------------------------------------------- what no CRD that is installed may let in


@pytest.mark.parametrize("kind", ["hostPath", "nfs", "iscsi", "flexVolume"])
def test_a_volume_that_reaches_out_is_refused(kind: str) -> None:
    refusal = reviewed(podTemplate={"volumes": [{"name": "v", kind: {"path": "/"}}]})
    assert refusal is not None
    assert refusal.reason == "VolumeNotAllowed"
    assert f"{kind} of volume 'v'" in refusal.message


@pytest.mark.parametrize("kind", ["configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected", "csi"])
def test_volumes_of_pod_security_restricted_are_accepted(kind: str) -> None:
    assert reviewed(podTemplate={"volumes": [{"name": "v", kind: {}}]}) is None


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"securityContext": {"privileged": True}}, "privileged"),
        ({"securityContext": {"allowPrivilegeEscalation": True}}, "allowPrivilegeEscalation"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser: 0"),
        ({"securityContext": {"runAsNonRoot": False}}, "runAsNonRoot: false"),
        ({"securityContext": {"procMount": "Unmasked"}}, "procMount"),
        ({"securityContext": {"capabilities": {"add": ["SYS_ADMIN"]}}}, "capabilities.add"),
        ({"securityContext": {"seccompProfile": {"type": "Unconfined"}}}, "seccompProfile Unconfined"),
        ({"ports": [{"containerPort": 1, "hostPort": 1}]}, "hostPort"),
    ],
)
def test_a_sidecar_with_privilege_is_refused_by_name(fields: dict[str, Any], problem: str) -> None:
    refusal = reviewed(podTemplate={"sidecars": [{"name": "s", "image": "i"} | fields]})
    assert refusal is not None
    assert refusal.reason == "SidecarNotAllowed"
    assert f"{problem} of sidecar 's'" in refusal.message


def test_a_sidecar_without_privilege_is_accepted() -> None:
    context = {"runAsUser": 1000, "privileged": False, "capabilities": {"drop": ["ALL"]}}
    assert reviewed(podTemplate={"sidecars": [{"name": "s", "image": "i", "securityContext": context}]}) is None


def test_a_sidecar_cannot_take_the_workers_place() -> None:
    assert reason(reviewed(podTemplate={"sidecars": [{"name": "worker", "image": "i"}]})) == "SidecarNotAllowed"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tensorParallelSize": 6, "ranksPerPod": 4}, "NotDivisible"),
        ({"rollout": {"maxUnavailable": 0}}, "RolloutImpossible"),
        ({"model": {"uri": "s3://bucket"}}, "UnknownModelSource"),
    ],
)
def test_what_the_operators_decisions_rely_on_is_checked_here_too(fields: dict[str, Any], expected: str) -> None:
    assert reason(reviewed(**fields)) == expected


def test_a_name_too_long_for_its_children_is_refused() -> None:
    spec = TPModelSpec.model_validate({"model": {"uri": HUB}})
    model = TPModel(name="m" * 43, namespace="n", uid="u", generation=1, spec=spec)
    refusal = review(model, volumes={}, settings=OperatorSettings(default_image="worker:1"))
    assert reason(refusal) == "NameTooLong"
