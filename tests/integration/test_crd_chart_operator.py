"""The rights that the chart gives are enough: a real operator process with exactly these, on a real API server.

No controller and no kubelet runs there; what they would do to pods the test does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.chart import CHART, NAMESPACE, RELEASE, helm, one, rendered
from support.crd_server import MODELS, KubeApi, RefusedError, tpmodel
from tests.cluster import apiserver
from tpmodel.local import free_ports

# helm is built on a machine's first run.
pytestmark = pytest.mark.timeout(1800)

SPACE = "/namespaces/default"
PATIENCE = 60.0


@contextlib.contextmanager
def operator(server: KubeApi, folder: Path, values: dict[str, Any], release: str) -> Iterator[str]:
    """The operator with the chart's command line and the rights of its account; gives the URL of its metrics."""
    deployment = one(rendered(values, release=release), "Deployment")
    pod = deployment["spec"]["template"]["spec"]
    health, metrics = free_ports(2)
    ports = {"--health-port": health, "--metrics-port": metrics}
    arguments = [flag for flag in pod["containers"][0]["args"] if flag.partition("=")[0] not in ports]
    arguments += [f"{flag}={port}" for flag, port in ports.items()]
    account = f"system:serviceaccount:{NAMESPACE}:{pod['serviceAccountName']}"
    kubeconfig = server.api.user(f"kubeconfig-{release}", account)
    with (folder / "operator.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from tpmodel_operator.main import main; main()", *arguments],
            env=os.environ | {"KUBECONFIG": str(kubeconfig), "POD_NAME": f"{release}-0"},
            stderr=log,
        )
        try:
            yield f"http://127.0.0.1:{metrics}/metrics"
        finally:
            process.terminate()
            try:
                assert process.wait(timeout=40) == 0
            finally:
                process.kill()


def until(what: str, found: Callable[[], Any], log: Path) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(RefusedError, OSError):
            if value := found():
                return value
        time.sleep(0.2)
    raise AssertionError(f"no {what} in {PATIENCE} s\n{log.read_text()[-4000:]}")


def refused_calls(metrics: str) -> list[str]:
    """Calls that the API server answered with 401 or 403."""
    with urllib.request.urlopen(metrics, timeout=10) as answer:
        text = answer.read().decode()
    calls = re.findall(r'tpmodel_operator_api_requests_total\{status="(\d+)",verb="(\w+)"\} (\S+)', text)
    assert any(status == "201" for status, _, _ in calls), calls
    return [f"{verb} {status}" for status, verb, _ in calls if status in ("401", "403")]


def one_life_of_a_model(server: KubeApi, name: str, log: Path) -> None:
    """Created, scaled, a container lost, removed: every kind of call the operator makes."""
    selector = f"tpmodel.dev/model={name}"

    def listed(path: str) -> list[dict[str, Any]]:
        return server.call("GET", path, labelSelector=selector)["items"]

    spec = {"device": "cpu", "tensorParallelSize": 2, "model": {"uri": "pvc://models/x"}}
    server.create(tpmodel(name, **spec))
    [gang] = until("StatefulSet", lambda: listed(f"/apis/apps/v1{SPACE}/statefulsets"), log)
    until("Services", lambda: len(listed(f"/api/v1{SPACE}/services")) == 3, log)
    until("ServiceAccount", lambda: listed(f"/api/v1{SPACE}/serviceaccounts"), log)
    until("NetworkPolicies", lambda: len(listed(f"/apis/networking.k8s.io/v1{SPACE}/networkpolicies")) == 2, log)
    until("attempt", lambda: listed(f"/api/v1{SPACE}/configmaps"), log)
    until("token", lambda: listed(f"/api/v1{SPACE}/secrets"), log)
    events = {"fieldSelector": f"involvedObject.name={name}"}
    until("Event", lambda: server.call("GET", f"/api/v1{SPACE}/events", **events)["items"], log)
    accepted = until("condition", lambda: server.call("GET", f"{MODELS}/{name}")["status"]["conditions"], log)
    assert {item["type"]: item["status"] for item in accepted}["Accepted"] == "True"

    scale(server, name, 2)
    budget = f"/apis/policy/v1{SPACE}/poddisruptionbudgets"
    until("PodDisruptionBudget", lambda: listed(budget), log)
    scale(server, name, 1)
    until("end of the PodDisruptionBudget", lambda: not listed(budget), log)

    pods = [pod_of(gang, index) for index in range(2)]
    for pod in pods:
        server.call("POST", f"/api/v1{SPACE}/pods", pod)
        set_container(server, pod, {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    ended = {"exitCode": 75, "finishedAt": "2026-01-01T00:00:01Z", "message": "a rank died"}
    # What ends before that is no fault of a gang that served.
    until("formed gang", lambda: server.call("GET", f"{MODELS}/{name}")["status"]["gangs"][0]["formed"], log)
    set_container(server, pods[1], {"terminated": ended})
    until("deletion of pods", lambda: not [p for p in listed(f"/api/v1{SPACE}/pods") if alive(p)], log)
    attempt = server.call("GET", f"/api/v1{SPACE}/configmaps/{gang['metadata']['name']}-attempt")
    assert attempt["data"] == {"attempt": "2"}

    scale(server, name, 0)
    until("end of the gang", lambda: not listed(f"/apis/apps/v1{SPACE}/statefulsets"), log)


def alive(pod: dict[str, Any]) -> bool:
    return "deletionTimestamp" not in pod["metadata"]


def scale(server: KubeApi, name: str, replicas: int) -> None:
    # The operator writes to the model meanwhile: a whole object that was read before would be refused.
    body = {"spec": {"replicas": replicas}}
    server.call("PATCH", f"{MODELS}/{name}/scale", body, content_type="application/merge-patch+json")


def pod_of(gang: dict[str, Any], index: int) -> dict[str, Any]:
    """As the StatefulSet's controller makes it."""
    template, name = gang["spec"]["template"], gang["metadata"]["name"]
    owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": name, "uid": gang["metadata"]["uid"]}
    labels = template["metadata"]["labels"] | {"apps.kubernetes.io/pod-index": str(index)}
    metadata = {"name": f"{name}-{index}", "labels": labels, "ownerReferences": [owner | {"controller": True}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


def set_container(server: KubeApi, pod: dict[str, Any], state: dict[str, Any]) -> None:
    """As the kubelet reports it."""
    worker = {"name": "worker", "image": "i", "imageID": "", "ready": False, "restartCount": 0, "state": state}
    body = {"status": {"phase": "Running", "containerStatuses": [worker]}}
    path = f"/api/v1{SPACE}/pods/{pod['metadata']['name']}/status"
    server.call("PATCH", path, body, content_type="application/merge-patch+json")


@pytest.mark.parametrize("namespaces", [[], ["default"]], ids=["cluster_wide", "one_namespace"])
def test_the_operator_needs_no_right_that_the_chart_does_not_give(tmp_path: Path, namespaces: list[str]) -> None:
    values = {"watchNamespaces": namespaces}
    log = tmp_path / "operator.log"
    with apiserver.running() as api:
        server = KubeApi(api)
        body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
        server.call("POST", "/api/v1/namespaces", body)
        where = ["--namespace", NAMESPACE, "--kubeconfig", str(api.kubeconfig)]
        helm("install", RELEASE, str(CHART), *where, "--values", "-", given=json.dumps(values))
        server.call("POST", f"/api/v1{SPACE}/persistentvolumeclaims", claim("models"))
        with operator(server, tmp_path, values, RELEASE) as metrics:
            one_life_of_a_model(server, "life", log)
            assert refused_calls(metrics) == [], log.read_text()[-4000:]


def claim(name: str) -> dict[str, Any]:
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
