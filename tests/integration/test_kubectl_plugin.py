"""`kubectl tpmodel` on a real API server, found and run by a real kubectl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import operator_cluster
from support.crd_server import MODELS, NAMESPACE, KubeApi, serving
from support.kubectl_plugin import Plugin
from support.operator_cluster import Cluster
from support.plugin_objects import model_json, pod_json
from tests.cluster import apiserver

# kubectl is built on a machine's first run.
pytestmark = pytest.mark.timeout(1800)

PODS = f"/api/v1/namespaces/{NAMESPACE}/pods"


@pytest.fixture(scope="module")
def server() -> Iterator[KubeApi]:
    with serving() as api:
        yield api


@pytest.fixture
def plugin(server: KubeApi, tmp_path: Path) -> Plugin:
    return Plugin.install(tmp_path, server.api.kubeconfig)


@pytest.fixture
def restarting(server: KubeApi) -> Iterator[Cluster]:
    """TPModel chat of two gangs, the second of which restarts; its status and pods are those of a real decision."""
    cluster = operator_cluster.Cluster(name="chat", spec=operator_cluster.spec_with(replicas=2))
    cluster.settle()
    cluster.end_container(cluster.pod(1, 1), 75, "rank 1 was killed by SIGKILL while the world was serving")
    cluster.reconcile()
    write(server, cluster)
    yield cluster
    server.call("DELETE", f"{MODELS}/chat")
    server.call("DELETE", PODS, {"gracePeriodSeconds": 0})


def write(server: KubeApi, cluster: Cluster) -> None:
    model = model_json(cluster)
    status = model.pop("status")
    model["metadata"] = {"name": cluster.name, "namespace": NAMESPACE}
    server.create(model)
    identity = {key: model[key] for key in ("apiVersion", "kind", "metadata")}
    server.apply(identity | {"status": status}, subresource="status", manager="tpmodel-operator")
    for pod in cluster.pods.values():
        item = pod_json(pod)
        metadata = {key: item["metadata"][key] for key in ("name", "labels")}
        containers = [{"name": name, "image": "image"} for name in ("worker", "sidecar")]
        body = {"metadata": metadata, "spec": {"containers": containers, "nodeName": pod.node}}
        server.call("POST", PODS, body)
        described = [entry | {"image": "image", "imageID": "", "ready": pod.ready} for entry in containers_of(item)]
        patch = {"status": item["status"] | {"containerStatuses": described}}
        server.call("PATCH", f"{PODS}/{pod.name}/status", patch, content_type="application/strategic-merge-patch+json")


def containers_of(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return pod["status"]["containerStatuses"]


def test_status_shows_gangs_restart_and_pods(plugin: Plugin, restarting: Cluster) -> None:
    result = plugin.run("status", "chat")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "TPModel default/chat: Restarting, 1/2 gangs ready, 1 restart"
    (restart,) = (line for line in lines if "last restart" in line)
    assert "RestartRequested, exit code 75: pod chat-1-" in restart
    assert "rank 1 was killed by SIGKILL" in restart
    for pod in restarting.pods.values():
        (line,) = (line for line in lines if line.split()[:1] == [pod.name])
        assert line.split()[1] == pod.node


def test_status_as_json_holds_the_same(plugin: Plugin, restarting: Cluster) -> None:
    shown = json.loads(plugin.run("status", "chat", "-n", "default", "-o", "json").stdout)
    assert [gang["phase"] for gang in shown["gangs"]] == ["Serving", "Restarting"]
    assert shown["gangs"][1]["last_restart"]["exit_code"] == 75
    states = {pod["name"]: pod["state"] for gang in shown["gangs"] for pod in gang["pods"]}
    assert set(states) == {pod.name for pod in restarting.pods.values()}
    assert states[restarting.pod(1, 1).name].startswith("ended with 75: rank 1 was killed")


def test_list_shows_the_reason(plugin: Plugin, restarting: Cluster) -> None:
    result = plugin.run("list", "-A")
    header, row = result.stdout.splitlines()
    assert header.split()[:3] == ["NAMESPACE", "NAME", "MODEL"]
    assert row.split()[:6] == ["default", "chat", "hf://organisation/model", "2", "1/2", "Restarting"]
    assert "GangRestarting: chat-1-" in row


def test_a_model_that_is_not_there_names_those_that_are(plugin: Plugin, restarting: Cluster) -> None:
    result = plugin.run("status", "chatt")
    assert result.returncode == 1
    assert result.stderr.strip() == "Error: there is no TPModel chatt in namespace default; there are: chat"


def test_a_user_without_rights_learns_which_are_missing(server: KubeApi, plugin: Plugin) -> None:
    nobody = server.api.user("nobody.kubeconfig", "nobody")
    result = plugin.run("list", f"--kubeconfig={nobody}")
    assert result.returncode == 1
    assert 'User "nobody" cannot list resource "tpmodels"' in result.stderr
    assert "ask for a role that allows it" in result.stderr


def test_a_context_that_is_not_there_is_named(server: KubeApi, plugin: Plugin) -> None:
    result = plugin.run("list", "--context=elsewhere")
    assert result.returncode == 1
    assert "there is no context elsewhere: kubectl config get-contexts" in result.stderr


def test_without_a_context_one_is_asked_for(server: KubeApi, plugin: Plugin, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("apiVersion: v1\nkind: Config\n")
    result = plugin.run("list", f"--kubeconfig={empty}")
    assert result.returncode == 1
    assert "kubectl config use-context NAME" in result.stderr


def test_a_cluster_without_the_crd_asks_for_the_operator(server: KubeApi, plugin: Plugin) -> None:
    with apiserver.running() as bare:
        result = plugin.run("list", f"--kubeconfig={bare.kubeconfig}")
    assert result.returncode == 1
    assert result.stderr.startswith("Error: this cluster knows no TPModels: install the operator")
