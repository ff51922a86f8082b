"""The CRD on a real API server: it is taken, fills in defaults, scales, shows columns, keeps unknown parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from support.crd_server import CRDS, MODELS, KubeApi, serving, tpmodel
from tpmodel_operator import crd
from tpmodel_operator.api import GangStatus, TPModelSpec, TPModelStatus

APPLIED_BY = "tpmodel-operator"
TABLE = "application/json;as=Table;v=v1;g=meta.k8s.io"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with serving() as api:
        yield api


def whole_spec() -> dict[str, Any]:
    """Every field in use at once."""
    return {
        "model": {
            "uri": "hf://Qwen/Qwen3-8B",
            "revision": "refs/pr/1",
            "secretRef": {"name": "hub", "key": "token"},
            "servedName": "qwen",
            "dtype": "bfloat16",
            "maxModelLen": 4096,
            "engineOptions": {
                "max_num_seqs": "32",
                "max_num_batched_tokens": "16",
                "block_size": "256",
                "kv_cache_memory": "2.5Gi",
                "prefix_cache": "false",
                "queue_limit": "10",
                "api_processes": "64",
                "communicator": "nccl",
                "step_deadline": "30.5",
                "respawn": "spare",
                "rebuild_limit": "0",
                "rebuild_wait": "90",
                "rebuild_stability_window": "600",
            },
        },
        "tensorParallelSize": 16,
        "ranksPerPod": 8,
        "replicas": 2,
        "device": "cuda",
        "resourceClaims": [{"name": "gpus", "resourceClaimTemplateName": "eight-gpus"}],
        "image": {"reference": "registry.example:5000/w@sha256:abc", "pullPolicy": "Always", "pullSecrets": ["a", "b"]},
        "resources": {"cpu": "1500m", "memory": "64Gi", "cpuLimit": "2"},
        "cache": {"type": "pvc", "claimName": "cache.shared"},
        "network": {"rdma": True, "rdmaResourceName": "rdma/shared_a"},
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, {"name": "B", "secretKeyRef": {"name": "s", "key": "k"}}],
        "scheduling": {
            "nodeSelector": {"pool": "gpu"},
            "tolerations": [
                {"operator": "Exists"},
                {"key": "gpu", "operator": "Equal", "value": "x", "effect": "NoExecute", "tolerationSeconds": 5},
            ],
            "deadNodeToleration": 0,
            "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": []}}},
            "priorityClassName": "high",
            "schedulerName": "volcano",
            "topologyKey": "topology.kubernetes.io/zone",
        },
        "recovery": {"mode": "Restart", "maxRestarts": 0, "backoffBase": 1, "backoffLimit": 1},
        "rollout": {"maxUnavailable": 0, "maxSurge": 1},
        "disruptionBudget": 0,
        "drainTimeout": 0,
        "service": {
            "type": "LoadBalancer",
            "port": 80,
            "httpPort": 443,
            "annotations": {"a.example/b": "c"},
            "from": [
                {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}},
                {"podSelector": {}, "namespaceSelector": {"matchLabels": {"team": "a"}}},
            ],
        },
        "auth": {"apiKey": {"name": "key", "key": "k"}, "tlsSecretName": "tls"},
        "podTemplate": {
            "labels": {"team.example/name": "a"},
            "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
            "volumes": [{"name": "extra", "configMap": {"name": "c", "items": [{"key": "k", "path": "p"}]}}],
            "volumeMounts": [{"name": "extra", "mountPath": "/etc/tpmodel-extra", "readOnly": True, "subPath": "p"}],
            "sidecars": [
                {
                    "name": "logs",
                    "image": "logs:1",
                    "args": ["--x"],
                    "ports": [{"containerPort": 1}],
                    "securityContext": {"runAsUser": 5, "capabilities": {"drop": ["ALL"]}, "privileged": False},
                }
            ],
        },
    }


def test_every_field_can_be_used_and_nothing_is_dropped(server: KubeApi) -> None:
    written = whole_spec()
    stored = server.create(tpmodel("whole", **written), dry_run=True)["spec"]
    assert TPModelSpec.model_validate(stored) == TPModelSpec.model_validate(written)
    assert stored["podTemplate"] == written["podTemplate"]


def test_the_api_server_fills_in_the_defaults_of_the_code(server: KubeApi) -> None:
    stored = server.create(tpmodel("defaults"), dry_run=True)["spec"]
    assert TPModelSpec.model_validate(stored) == TPModelSpec.model_validate(tpmodel()["spec"])
    assert (stored["recovery"]["maxRestarts"], stored["rollout"]) == (10, {"maxUnavailable": 1, "maxSurge": 0})


def test_defaults_also_fill_a_part_that_was_begun(server: KubeApi) -> None:
    stored = server.create(tpmodel("begun", recovery={"maxRestarts": 3}), dry_run=True)["spec"]
    assert (stored["recovery"]["maxRestarts"], stored["recovery"]["backoffLimit"]) == (3, 600)


@pytest.mark.parametrize(
    "uri",
    [
        "hf://Qwen/Qwen3-8B",
        "hf://org_1/Name.with-all_3",
        "pvc://models",
        "pvc://models/",
        "pvc://my.claim/a folder/..b/c",
        "file:///var/lib/models/x",
        "oci://registry.example:5000/team/model:1.0",
        "oci://registry.example/model@sha256:0123",
    ],
)
def test_every_kind_of_model_is_accepted(server: KubeApi, uri: str) -> None:
    assert server.create(tpmodel("uri", model={"uri": uri}), dry_run=True)["spec"]["model"]["uri"] == uri


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8, 12, 16, 32, 72])
def test_any_size_without_ranks_per_pod_is_accepted(server: KubeApi, size: int) -> None:
    server.create(tpmodel("size", tensorParallelSize=size), dry_run=True)


def test_a_mig_slice_serves_one_rank(server: KubeApi) -> None:
    server.create(tpmodel("mig", gpuResourceName="nvidia.com/mig-1g.10gb"), dry_run=True)


def test_the_longest_name_is_accepted(server: KubeApi) -> None:
    server.create(tpmodel("m" * 42), dry_run=True)


def test_scale_reads_and_writes_replicas_and_offers_the_selector(server: KubeApi) -> None:
    server.create(tpmodel("scaled"))
    selector = "tpmodel.dev/model=scaled,apps.kubernetes.io/pod-index=0"
    apply_status(server, "scaled", TPModelStatus(replicas=1, selector=selector))
    scale = server.call("GET", f"{MODELS}/scaled/scale")
    assert (scale["spec"]["replicas"], scale["status"]) == (1, {"replicas": 1, "selector": selector})
    scale["spec"]["replicas"] = 4
    server.call("PUT", f"{MODELS}/scaled/scale", scale)
    assert server.call("GET", f"{MODELS}/scaled")["spec"]["replicas"] == 4


def test_columns_show_the_model_at_a_glance(server: KubeApi) -> None:
    server.create(tpmodel("seen", replicas=2, tensorParallelSize=4))
    url = "dns:///seen-leaders.default.svc:9000"
    apply_status(server, "seen", TPModelStatus(ready="1/2", state="Progressing", restarts=3, url=url))
    table = server.call("GET", f"{MODELS}/seen", accept=TABLE)
    narrow = [index for index, column in enumerate(table["columnDefinitions"]) if column["priority"] == 0]
    names = [table["columnDefinitions"][index]["name"].upper() for index in narrow]
    cells = [table["rows"][0]["cells"][index] for index in narrow]
    assert names == ["NAME", "MODEL", "TP", "READY", "STATUS", "RESTARTS", "URL", "AGE"]
    assert cells[:-1] == ["seen", "hf://organisation/name", 4, "1/2", "Progressing", 3, url]


def test_a_status_is_applied_whole_and_reads_back(server: KubeApi) -> None:
    server.create(tpmodel("whole-status"))
    gangs = [
        GangStatus(name=f"whole-status-{index}-abcde", index=index, revision="abcde", epoch=(7 << 32) | 3)
        for index in range(3)
    ]
    apply_status(server, "whole-status", TPModelStatus(replicas=3, gangs=gangs))
    fewer = TPModelStatus(replicas=2, gangs=gangs[1:])
    apply_status(server, "whole-status", fewer)
    assert TPModelStatus.model_validate(server.call("GET", f"{MODELS}/whole-status")["status"]) == fewer


def test_a_status_write_leaves_the_spec_alone(server: KubeApi) -> None:
    server.create(tpmodel("untouched", replicas=3))
    apply_status(server, "untouched", TPModelStatus(replicas=1))
    written = server.call("GET", f"{MODELS}/untouched")
    assert (written["spec"]["replicas"], written["metadata"]["generation"]) == (3, 1)


def test_explain_finds_every_description_in_the_served_openapi(server: KubeApi) -> None:
    document = server.call("GET", "/openapi/v3/apis/tpmodel.dev/v1alpha1")
    schema = document["components"]["schemas"]["dev.tpmodel.v1alpha1.TPModel"]["properties"]
    rendered = crd.object_schema()["properties"]
    assert schema["spec"] == rendered["spec"]
    assert schema["status"]["properties"]["gangs"] == rendered["status"]["properties"]["gangs"]


def test_the_crd_is_served_under_its_short_name(server: KubeApi) -> None:
    resources = server.call("GET", "/apis/tpmodel.dev/v1alpha1")["resources"]
    model = next(resource for resource in resources if resource["name"] == "tpmodels")
    assert (model["shortNames"], model["categories"]) == (["tpm"], ["all"])
    assert {resource["name"] for resource in resources} == {"tpmodels", "tpmodels/status", "tpmodels/scale"}


def test_the_crd_can_be_applied_again_over_itself(server: KubeApi) -> None:
    name = crd.render()["metadata"]["name"]
    path = f"{CRDS}/{name}"
    before = server.call("GET", path)["metadata"]["generation"]
    applied = server.call(
        "PATCH", path, crd.render(), content_type="application/apply-patch+yaml", fieldManager="helm", force="true"
    )
    assert applied["metadata"]["generation"] == before


def apply_status(server: KubeApi, name: str, status: TPModelStatus) -> None:
    """As the operator writes it."""
    body = tpmodel(name) | {"status": status.model_dump(mode="json", by_alias=True, exclude_none=True)}
    del body["spec"]
    server.apply(body, subresource="status", manager=APPLIED_BY)
