"""A real API server takes every child as the builders make it, and Pod Security `restricted` takes the pods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.crd_server import KubeApi, RefusedError, serving
from support.operator_objects import GANG, model_with
from tpmodel_operator.actions import EnsureModelChildren
from tpmodel_operator.resources import gang_children, model_children
from tpmodel_operator.settings import OperatorSettings

SETTINGS = OperatorSettings(default_image="i", monitoring_namespaces=("monitoring",))
NAMESPACE = "space"

COLLECTIONS = {
    "ServiceAccount": "api/v1/namespaces/space/serviceaccounts",
    "Service": "api/v1/namespaces/space/services",
    "Secret": "api/v1/namespaces/space/secrets",
    "ConfigMap": "api/v1/namespaces/space/configmaps",
    "NetworkPolicy": "apis/networking.k8s.io/v1/namespaces/space/networkpolicies",
    "PodDisruptionBudget": "apis/policy/v1/namespaces/space/poddisruptionbudgets",
    "StatefulSet": "apis/apps/v1/namespaces/space/statefulsets",
    "Pod": "api/v1/namespaces/space/pods",
}

SPECS: dict[str, dict[str, Any]] = {
    "smallest": {},
    "hub": {
        "model": {
            "uri": "hf://a/b",
            "secretRef": {"name": "hub", "key": "token"},
            "engineOptions": {"block_size": "16"},
        },
        "env": [{"name": "A", "value": "$(TPMODEL_POD_IP)"}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}],
        "auth": {"apiKey": {"name": "keys", "key": "chat"}, "tlsSecretName": "cert"},
        "cache": {"type": "pvc", "claimName": "cache"},
    },
    "updated by a trainer": {
        "auth": {"trainerToken": {"name": "trainer", "key": "token"}},
        "weightUpdates": {
            "from": [{"podSelector": {"matchLabels": {"app": "trainer"}}}],
            "persistUpdates": "pvc://updates/sets",
        },
    },
    "claim on GPUs": {
        "model": {"uri": "pvc://weights/8b"},
        "device": "cuda",
        "tensorParallelSize": 8,
        "ranksPerPod": 4,
        "cache": {"type": "emptyDir", "sizeLimit": "10Gi"},
        "resources": {"cpu": "4", "memory": "64Gi", "cpuLimit": "8"},
        "image": {"pullPolicy": "Always", "pullSecrets": ["registry"]},
    },
    "image volume on claimed devices": {
        "model": {"uri": "oci://r.example/8b:1"},
        "device": "cuda",
        "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}],
    },
    "placed": {
        "scheduling": {
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "topologyKey": "example.com/rack",
            "priorityClassName": "",
            "schedulerName": "other",
            "affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": []}},
        },
        "service": {
            "type": "NodePort",
            "port": 80,
            "annotations": {"a": "b"},
            "from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
        },
    },
    "with a sidecar": {
        "podTemplate": {
            "labels": {"team": "a"},
            "annotations": {"note": "b"},
            "volumes": [{"name": "extra", "emptyDir": {}}],
            "volumeMounts": [{"name": "extra", "mountPath": "/extra"}],
            "sidecars": [
                {"name": "logs", "image": "logs:1", "volumeMounts": [{"name": "extra", "mountPath": "/extra"}]}
            ],
        }
    },
}

NOT_RESTRICTED: dict[str, dict[str, Any]] = {
    "node folder": {"model": {"uri": "file:///models/8b"}, "cache": {"type": "hostPath", "path": "/var/cache"}},
    "rdma": {"device": "cuda", "network": {"rdma": True}},
}
"""What the design excepts."""


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with serving() as api:
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        api.call("POST", "/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
        open_to_all = {"pod-security.kubernetes.io/enforce": "privileged"}
        api.call("POST", "/api/v1/namespaces", {"metadata": {"name": "open", "labels": open_to_all}})
        yield api


def create(server: KubeApi, child: dict[str, Any]) -> dict[str, Any]:
    """As the API server would keep it; unknown and doubled fields are refused."""
    path = "/" + COLLECTIONS[child["kind"]]
    return server.call("POST", path, child, dryRun="All", fieldValidation="Strict")


def children(spec: dict[str, Any]) -> list[dict[str, Any]]:
    model = model_with(**spec)
    shared = model_children(model, EnsureModelChildren(disruptable_pods=1), SETTINGS)
    return [*shared, *gang_children(model, GANG, token="t")]


def a_pod(spec: dict[str, Any]) -> dict[str, Any]:
    """What the StatefulSet controller would make, without the account, which nobody has made here."""
    statefulset = next(child for child in children(spec) if child["kind"] == "StatefulSet")
    template = statefulset["spec"]["template"]
    pod_spec = {name: value for name, value in template["spec"].items() if name != "serviceAccountName"}
    metadata = {"name": "pod", "namespace": NAMESPACE, "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod_spec}


@pytest.fixture(scope="module", autouse=True)
def account(server: KubeApi) -> None:
    """The controller that makes it in every namespace does not run."""
    body = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": NAMESPACE}}
    server.call("POST", "/" + COLLECTIONS["ServiceAccount"], body)


@pytest.mark.parametrize("name", [*SPECS, *NOT_RESTRICTED])
def test_the_api_server_takes_every_child(server: KubeApi, name: str):
    for child in children((SPECS | NOT_RESTRICTED)[name]):
        kept = create(server, child)
        assert kept["metadata"]["name"] == child["metadata"]["name"]


@pytest.mark.parametrize("name", list(SPECS))
def test_pod_security_restricted_takes_the_pods(server: KubeApi, name: str):
    pod = create(server, a_pod(SPECS[name]))
    worker = next(container for container in pod["spec"]["containers"] if container["name"] == "worker")
    assert worker["env"][0]["name"] == "TPMODEL_POD_NAME"


@pytest.mark.parametrize("name", list(NOT_RESTRICTED))
def test_node_folders_and_rdma_need_a_namespace_that_allows_them(server: KubeApi, name: str):
    with pytest.raises(RefusedError, match="violates PodSecurity"):
        create(server, a_pod(NOT_RESTRICTED[name]))


def test_applying_a_child_twice_changes_nothing(server: KubeApi):
    for child in children(SPECS["placed"]):
        if child["kind"] in ("Secret", "StatefulSet"):
            continue  # made once, never applied
        path = f"/{COLLECTIONS[child['kind']]}/{child['metadata']['name']}"
        query = {"fieldManager": "tpmodel-operator", "force": "true", "fieldValidation": "Strict"}
        first, second = (
            server.call("PATCH", path, child, content_type="application/apply-patch+yaml", **query) for _ in range(2)
        )
        assert first["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"]
