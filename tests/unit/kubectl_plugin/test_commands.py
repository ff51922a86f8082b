"""The commands, with a stand-in for kubectl."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from support import operator_cluster
from support.operator_cluster import Cluster
from support.plugin_objects import model_json, pods_json, view
from support.stand_in_kubectl import StandInKubectl
from tpmodel.kubectl import commands
from tpmodel.kubectl.status import print_changes
from tpmodel.kubectl.view import ModelView

NOT_FOUND = 'Error from server (NotFound): tpmodels.tpmodel.dev "chat" not found\n'


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands, list(arguments), catch_exceptions=False)


def serve(kubectl: StandInKubectl, cluster: Cluster) -> None:
    kubectl.has(model_json(cluster), pods_json(cluster))


def test_without_kubectl_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = run("list")
    assert result.exit_code == 1
    assert result.output == "Error: kubectl is not in PATH: install it, this plugin talks to the cluster through it\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "m", "-n", "space", "--context=other", "--kubeconfig", "/k"),
        ("-n", "space", "--context=other", "--kubeconfig=/k", "status", "m"),
        ("-n", "elsewhere", "--context=other", "status", "m", "--kubeconfig=/k", "--namespace=space"),
    ],
)
def test_cluster_and_namespace_are_passed_on_to_kubectl(kubectl: StandInKubectl, arguments: tuple[str, ...]) -> None:
    serve(kubectl, operator_cluster.serving())
    assert run(*arguments).exit_code == 0
    for call in kubectl.calls:
        assert {"--context=other", "--namespace=space", "--kubeconfig=/k"} <= set(call)


def test_status_prints_the_tree(kubectl: StandInKubectl) -> None:
    serve(kubectl, operator_cluster.serving())
    result = run("status", "m")
    assert result.output.startswith("TPModel space/m: Ready, 1/1 gangs ready\n")


def test_status_as_json_is_one_object_with_gangs_and_pods(kubectl: StandInKubectl) -> None:
    cluster = operator_cluster.serving(replicas=2)
    serve(kubectl, cluster)
    shown = json.loads(run("status", "m", "--output=json").output)
    assert [gang["name"] for gang in shown["gangs"]] == [gang.name for gang in cluster.status.gangs]
    assert all(len(gang["pods"]) == 2 for gang in shown["gangs"])


def test_status_adds_events_where_pods_have_not_started(kubectl: StandInKubectl) -> None:
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    serve(kubectl, cluster)
    pod = cluster.pod(0)
    old = event(pod.uid, "FailedMount", "an older one", "2026-01-01T00:00:01Z")
    new = event(pod.uid, "FailedMount", 'secret "hub" not found', "2026-01-01T00:00:09Z")
    kubectl.answer("get", "events", output={"items": [new, old, event("other", "Unhealthy", "not it", "")]})
    output = run("status", "m").output
    assert 'waits: ContainerCreating; FailedMount: secret "hub" not found' in output
    assert "older one" not in output
    assert "not it" not in output


def event(uid: str, reason: str, message: str, time: str) -> dict[str, Any]:
    return {
        "metadata": {"creationTimestamp": "2026-01-01T00:00:00Z"},
        "involvedObject": {"uid": uid},
        "reason": reason,
        "message": message,
        "lastTimestamp": time,
    }


def test_events_are_not_asked_for_when_every_container_runs(kubectl: StandInKubectl) -> None:
    serve(kubectl, operator_cluster.serving())
    assert run("status", "m").exit_code == 0
    assert not any("events" in call for call in kubectl.calls)


def test_a_model_that_is_not_there_names_those_that_are(kubectl: StandInKubectl) -> None:
    serve(kubectl, operator_cluster.serving())
    kubectl.answer("get", "tpmodels.tpmodel.dev", "chat", errors=NOT_FOUND, code=1)
    result = run("status", "chat")
    assert result.exit_code == 1
    assert result.output == "Error: there is no TPModel chat in namespace space; there are: m\n"


def test_a_model_in_an_empty_namespace_points_at_the_others(kubectl: StandInKubectl) -> None:
    kubectl.answer("get", "tpmodels.tpmodel.dev", output={"items": []})
    kubectl.answer("get", "tpmodels.tpmodel.dev", "chat", errors=NOT_FOUND, code=1)
    result = run("status", "chat", "-n", "empty")
    assert result.output.startswith("Error: there is no TPModel chat, and none at all in empty; see: ")


def test_watching_prints_changes_only(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = operator_cluster.serving()
    before = view(cluster)
    cluster.end_container(cluster.pod(1), 75)
    cluster.reconcile()
    looks: Iterator[ModelView] = iter([before, before, view(cluster)])
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        print_changes(lambda: next(looks), lambda model: model.state, sleep)
    assert capsys.readouterr().out == "Ready\nRestarting\n"


def test_list_shows_every_model_and_why_one_does_not_serve(kubectl: StandInKubectl) -> None:
    good, bad = Cluster(name="good"), Cluster(name="bad", spec=operator_cluster.spec_with(model={"uri": "pvc://gone"}))
    good.settle()
    bad.reconcile()
    kubectl.answer("get", "tpmodels.tpmodel.dev", output={"items": [model_json(good), model_json(bad)]})
    lines = run("list").output.splitlines()
    assert lines[0].split() == ["NAME", "MODEL", "TP", "READY", "STATUS", "RESTARTS", "AGE", "WHY"]
    assert lines[1].split()[:5] == ["bad", "pvc://gone", "2", "0/1", "Refused"]
    assert "ClaimNotFound: PersistentVolumeClaim 'gone' does not exist" in lines[1]
    assert lines[2].split()[:5] == ["good", "hf://organisation/model", "2", "1/1", "Ready"]
    assert len(lines[2].split()) == 7


def test_list_of_all_namespaces_names_them(kubectl: StandInKubectl) -> None:
    kubectl.answer("get", "--all-namespaces", output={"items": [model_json(operator_cluster.serving())]})
    header, row = run("list", "-A").output.splitlines()
    assert (header.split()[0], row.split()[0]) == ("NAMESPACE", "space")


def test_list_of_nothing_says_so(kubectl: StandInKubectl) -> None:
    kubectl.answer("get", output={"items": []})
    result = run("list")
    assert (result.exit_code, result.output) == (0, "there are no TPModels in this namespace\n")
