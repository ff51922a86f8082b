"""The operator as a process against a real API server: it serves a model, answers faults, outlives outages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from support.crd_server import MODELS, KubeApi, RefusedError, serving, tpmodel
from support.operator_process import Operator, operating, wait_for
from support.simulated_cluster import SimulatedCluster

Json = dict[str, Any]


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(api: KubeApi) -> Iterator[SimulatedCluster]:
    with SimulatedCluster(api).running() as simulated:
        yield simulated


@pytest.fixture(scope="module")
def operator(api: KubeApi, cluster: SimulatedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    log = tmp_path_factory.mktemp("operator") / "log"
    with operating(Operator(api.api.kubeconfig, log, arguments=["--resync-seconds=5"])) as started:
        yield started


def create(api: KubeApi, name: str, **spec: Any) -> None:
    api.create(tpmodel(name, device="cpu", tensorParallelSize=2, **spec))


def read(api: KubeApi, name: str) -> Json:
    return api.call("GET", f"{MODELS}/{name}")


def status(api: KubeApi, name: str) -> Json:
    return read(api, name).get("status", {})


def is_ready(api: KubeApi, name: str) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in status(api, name).get("conditions", []))


def served(api: KubeApi, name: str, **spec: Any) -> Json:
    """The first gang's status of a model that has just come up."""
    create(api, name, **spec)
    wait_for(lambda: is_serving(api, name), seconds=20, what=f"{name} to serve")
    return status(api, name)["gangs"][0]


def is_serving(api: KubeApi, name: str) -> bool:
    """Ready, and every pod of the first gang too (Ready is the leader pod's)."""
    gang = next(iter(status(api, name).get("gangs", [])), {})
    return is_ready(api, name) and gang["phase"] == "Serving" and all(pod["ready"] for pod in gang["pods"])


def children(api: KubeApi, name: str) -> list[Json]:
    """All namespaced objects with the model's label."""
    paths = [
        "/apis/apps/v1/statefulsets",
        "/api/v1/services",
        "/api/v1/secrets",
        "/api/v1/configmaps",
        "/api/v1/serviceaccounts",
        "/apis/networking.k8s.io/v1/networkpolicies",
        "/apis/policy/v1/poddisruptionbudgets",
    ]
    return [
        item | {"plural": path.rpartition("/")[2]}
        for path in paths
        for item in api.call("GET", path, labelSelector=f"tpmodel.dev/model={name}")["items"]
    ]


def owned_fields(item: Json) -> Json:
    """What the operator's entries of managedFields claim."""
    entries = [e for e in item["metadata"]["managedFields"] if e["manager"] == "tpmodel-operator"]
    return {key: value for entry in entries for key, value in entry["fieldsV1"].items()}


def test_a_model_becomes_ready(api: KubeApi, operator: Operator):
    gang = served(api, "first")
    assert (gang["attempt"], gang["phase"], len(gang["pods"])) == (1, "Serving", 2)
    assert status(api, "first")["url"] == "dns:///first-leaders.default.svc:9000"
    plurals = {"statefulsets", "services", "secrets", "configmaps", "serviceaccounts", "networkpolicies"}
    assert {item["plural"] for item in children(api, "first")} == plurals
    assert len(children(api, "first")) == 9


def test_a_container_that_ends_restarts_the_gang_once_with_its_cause(
    api: KubeApi, operator: Operator, cluster: SimulatedCluster
):
    gang = served(api, "ends")
    before = cluster.uids("ends")
    worker = next(pod for pod in cluster.pods("ends") if pod["metadata"]["name"].endswith("-1"))
    cluster.end_container(worker, 75, "rank 1: NCCL timeout")
    wait_for(lambda: status(api, "ends")["gangs"][0]["attempt"] == 2, seconds=10, what="the next attempt")
    wait_for(lambda: is_serving(api, "ends"), seconds=20, what="Ready again")
    after = status(api, "ends")["gangs"][0]
    assert after["lastRestart"]["cause"] == "RestartRequested"
    assert after["lastRestart"]["exitCode"] == 75
    assert "rank 1: NCCL timeout" in after["lastRestart"]["message"]
    assert not before & cluster.uids("ends")
    assert after["restartsTotal"] == 1
    attempt = api.call("GET", f"/api/v1/namespaces/default/configmaps/{gang['name']}-attempt")
    assert attempt["data"] == {"attempt": "2"}


def test_a_pod_that_is_deleted_restarts_the_gang_once(api: KubeApi, operator: Operator, cluster: SimulatedCluster):
    served(api, "deleted", recovery={"mode": "Restart"})
    before = cluster.uids("deleted")
    name = cluster.pods("deleted")[0]["metadata"]["name"]
    api.call("DELETE", f"/api/v1/namespaces/default/pods/{name}")
    wait_for(lambda: len(cluster.uids("deleted") - before) == 2, seconds=10, what="two new pods")
    wait_for(lambda: is_serving(api, "deleted"), seconds=20, what="Ready again")
    assert status(api, "deleted")["gangs"][0]["attempt"] == 2


def test_in_place_a_pod_that_is_deleted_is_made_again_alone_and_costs_no_attempt(
    api: KubeApi, operator: Operator, cluster: SimulatedCluster
):
    gang = served(api, "in-place", recovery={"mode": "InPlace"})
    before = cluster.uids("in-place")
    name = cluster.pods("in-place")[1]["metadata"]["name"]
    api.call("DELETE", f"/api/v1/namespaces/default/pods/{name}")
    wait_for(lambda: len(cluster.uids("in-place") - before) == 1, seconds=10, what="a new pod")
    wait_for(lambda: seen_uids(api, "in-place") == cluster.uids("in-place"), seconds=20, what="the new pod in status")
    wait_for(lambda: is_serving(api, "in-place"), seconds=20, what="Ready again")
    after = status(api, "in-place")["gangs"][0]
    assert (after["attempt"], after["restartsTotal"]) == (gang["attempt"], 0)
    assert len(before & cluster.uids("in-place")) == 1


def test_a_rebuild_that_is_asked_for_is_a_file_beside_the_attempt(api: KubeApi, operator: Operator):
    """W26."""
    gang = served(api, "rebuilt", recovery={"mode": "InPlace"})
    config_map = f"/api/v1/namespaces/default/configmaps/{gang['name']}-attempt"
    for number in ("1", "2"):
        annotated = {"metadata": {"annotations": {"tpmodel.dev/rebuild": f"at {number}"}}}
        api.call("PATCH", f"{MODELS}/rebuilt", annotated, content_type="application/merge-patch+json")
        wait_for(lambda: api.call("GET", config_map)["data"].get("rebuild"), seconds=10, what="the file")
        wait_for(lambda n=number: api.call("GET", config_map)["data"]["rebuild"] == n, seconds=10, what=number)
    assert api.call("GET", config_map)["data"] == {"attempt": "1", "rebuild": "2"}
    assert status(api, "rebuilt")["rebuildRequested"] == "at 2"


def seen_uids(api: KubeApi, name: str) -> set[str]:
    return {pod["uid"] for pod in status(api, name)["gangs"][0]["pods"]}


def test_the_operator_owns_no_field_of_the_spec_and_others_scale(api: KubeApi, operator: Operator):
    served(api, "scaled", replicas=1)
    patch = {"content_type": "application/merge-patch+json", "fieldManager": "autoscaler"}
    api.call("PATCH", f"{MODELS}/scaled/scale", {"spec": {"replicas": 2}}, **patch)
    wait_for(lambda: status(api, "scaled").get("readyReplicas") == 2, seconds=20, what="two gangs")
    model = read(api, "scaled")
    assert model["spec"]["replicas"] == 2
    assert set(owned_fields(model)) == {"f:status"}
    assert api.call("GET", f"{MODELS}/scaled/scale")["status"]["replicas"] == 2


def test_nothing_made_by_the_operator_holds_up_a_deletion(api: KubeApi, operator: Operator, cluster: SimulatedCluster):
    """Namespaces end and uninstalls finish: no finalizers, and everything is owned by the model, at last."""
    served(api, "going", replicas=2)
    model = read(api, "going")
    items = children(api, "going")
    uids = {item["metadata"]["uid"] for item in [model, *items]}
    for item in [model, *items]:
        assert not item["metadata"].get("finalizers")
    for item in items:
        assert {owner["uid"] for owner in item["metadata"]["ownerReferences"]} <= uids
        assert not any(owner.get("blockOwnerDeletion") for owner in item["metadata"]["ownerReferences"])
    assert not [name for name in model["metadata"].get("annotations", {}) if "kopf" in name]
    api.call("DELETE", f"{MODELS}/going")
    with pytest.raises(RefusedError, match="404"):
        read(api, "going")


def test_a_model_made_again_under_its_name_is_served_anew(api: KubeApi, operator: Operator):
    served(api, "again")
    uid = read(api, "again")["metadata"]["uid"]
    api.call("DELETE", f"{MODELS}/again")
    create(api, "again")
    wait_for(lambda: bool(status(api, "again").get("conditions")), seconds=10, what="a status")
    assert read(api, "again")["metadata"]["uid"] != uid


def test_a_refused_model_says_what_to_do_and_events_are_not_repeated(api: KubeApi, operator: Operator):
    create(api, "refused", model={"uri": "pvc://nowhere/path"})
    wait_for(lambda: bool(status(api, "refused").get("conditions")), seconds=10, what="a status")
    accepted = next(c for c in status(api, "refused")["conditions"] if c["type"] == "Accepted")
    assert (accepted["status"], accepted["reason"]) == ("False", "ClaimNotFound")
    for number in range(3):
        body = {"metadata": {"annotations": {"touched": str(number)}}}
        api.call("PATCH", f"{MODELS}/refused", body, content_type="application/merge-patch+json")
    events = api.call("GET", "/api/v1/namespaces/default/events", fieldSelector="involvedObject.name=refused")["items"]
    assert len({(event["reason"], event["message"]) for event in events}) == len(events) > 0


def test_a_restart_of_the_api_server_is_outlived(api: KubeApi, operator: Operator, cluster: SimulatedCluster):
    served(api, "outage")
    pid = operator.process.pid
    api.api.apiserver.kill()
    api.api.start_apiserver()
    before = cluster.uids("outage")
    cluster.end_container(cluster.pods("outage")[1], 75, "after the outage")
    wait_for(lambda: len(cluster.uids("outage") - before) == 2, seconds=30, what="the restart of the gang")
    wait_for(lambda: is_serving(api, "outage"), seconds=20, what="Ready again")
    assert status(api, "outage")["gangs"][0]["attempt"] == 2
    assert (operator.process.pid, operator.process.poll()) == (pid, None)
    assert operator.healthy()


def test_logs_are_json_and_metrics_say_what_happened(api: KubeApi, operator: Operator):
    lines = [json.loads(line) for line in operator.lines().splitlines() if line]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    assert any(line.get("model") == "default/ends" for line in lines)
    assert operator.metric("tpmodel_operator_gang_restarts_total") >= 2
    assert operator.metric("tpmodel_operator_restart_reaction_seconds_count") >= 2
    assert operator.metric("tpmodel_operator_queue_depth") == 0
    assert operator.metric("tpmodel_operator_cache_differences") == 0
