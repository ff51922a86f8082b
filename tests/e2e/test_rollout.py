"""Gangs are replaced one by one, whole, and nobody's stream is cut: by a new template, by a drained node; a rollout
that cannot succeed stops before it does harm."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from support.scale import E2E_STREAM_SECONDS
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.local import LocalCluster
from tests.cluster.target import Target
from tests.e2e.conftest import CLIENT_NODE
from tests.e2e.support import long_answers
from tests.e2e.support.clients import Client
from tests.e2e.support.history import PodHistory
from tests.e2e.support.models import (
    READY_SECONDS,
    DeployedModel,
    deployed,
    gang_of,
    is_ready,
    is_terminating,
    node_of,
    revision_of,
)
from tpmodel_operator import names

MODEL = "rolled"
STREAM_TOKENS = 30_000
"""More than a stream's time is enough for."""
DRAIN_SECONDS = 400.0
"""For kubectl drain of a node with a pod of each gang: streams end, the gang restarts, then the next pod may go."""


@pytest.fixture(scope="module")
def rolled(target: Target, cluster: LocalCluster, models: Kubectl) -> Iterator[DeployedModel]:
    """Two gangs of two pods, none on the clients' node. `cluster`: nodes are drained."""
    long_answers.place(target)
    away = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [CLIENT_NODE]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [away]}}}
    with deployed(
        models,
        MODEL,
        model={"uri": long_answers.URI},
        replicas=2,
        recovery={"backoffBase": 0, "backoffLimit": 0},
        scheduling={"affinity": affinity},
    ) as model:
        yield model


def test_a_template_change_replaces_gang_by_gang_and_fails_no_stream(rolled: DeployedModel, client: Client) -> None:
    old = {gang["name"] for gang in rolled.gangs()}
    with (
        PodHistory(rolled) as history,
        client.load_on_all(
            rolled.leaders(), rolled.url, streams=4, tokens=STREAM_TOKENS, seconds=E2E_STREAM_SECONDS
        ) as load,
    ):
        changed = time.time()
        rolled.patch({"env": [{"name": "OMP_NUM_THREADS", "value": "1"}, {"name": "GENERATION", "value": "2"}]})
        rolled.wait_ready(seconds=2 * READY_SECONDS)
        load.stop()
    assert load.failures() == []
    lasted = load.running_at(changed)
    assert len(lasted) == 4
    assert min(lasted) >= E2E_STREAM_SECONDS
    check_no_gang_is_mixed(history)
    check_some_gang_always_serves(history)
    check_one_gang_at_a_time(history, gangs=2)
    for pod in rolled.pods():
        assert variable(pod, "GENERATION") == "2"
    assert not old & {gang["name"] for gang in rolled.gangs()}
    assert all(gang["attempt"] == 1 for gang in rolled.gangs()), "a rollout is no restart"


def test_draining_a_workers_node_fails_no_stream(rolled: DeployedModel, client: Client) -> None:
    # A worker pod, with as few others as there are on a node that the clients are not on.
    workers = [pod for pod in rolled.pods() if pod["metadata"]["labels"][names.POD_INDEX] != "0"]
    pods_of = {node_of(pod): sum(node_of(other) == node_of(pod) for other in rolled.pods()) for pod in workers}
    node = min(pods_of, key=lambda name: pods_of[name])
    touched = {gang_of(pod) for pod in rolled.pods() if node_of(pod) == node}
    attempts = {gang["name"]: gang["attempt"] for gang in rolled.gangs()}
    with client.load_on_all(
        rolled.leaders(), rolled.url, streams=4, tokens=STREAM_TOKENS, seconds=E2E_STREAM_SECONDS
    ) as load:
        began = time.time()
        try:
            rolled.kubectl.run(
                "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", seconds=DRAIN_SECONDS
            )
            assert [pod for pod in rolled.pods() if node_of(pod) == node] == []
            rolled.wait_ready()
        finally:
            rolled.kubectl.run("uncordon", node)
        load.stop()
    assert load.failures() == []
    lasted = load.running_at(began)
    assert len(lasted) == 4
    assert min(lasted) >= E2E_STREAM_SECONDS
    after = {gang["name"]: gang["attempt"] for gang in rolled.gangs()}
    assert after == {name: attempt + (name in touched) for name, attempt in attempts.items()}


def test_a_rollout_that_cannot_succeed_stops_and_setting_the_spec_back_heals_it(
    rolled: DeployedModel, client: Client
) -> None:
    old = {gang["name"]: rolled.uids(gang["name"]) for gang in rolled.gangs()}
    # More than the checkpoint has: only the worker can know, and ends with 64.
    rolled.patch({"model": {"maxModelLen": 2 * long_answers.POSITIONS}})
    stalled = rolled.until(lambda: _holding(rolled, "Stalled"), what="Stalled")
    assert stalled["reason"] == "ConfigurationRefused"
    progressing = rolled.condition("Progressing")
    assert (progressing["status"], progressing["reason"]) == ("False", "RolloutStalled")
    assert f"{2 * long_answers.POSITIONS} is more than the {long_answers.POSITIONS} positions" in stalled["message"]
    serving = [gang for gang in rolled.gangs() if gang["ready"]]
    assert [rolled.uids(gang["name"]) for gang in serving] == [old[gang["name"]] for gang in serving]
    assert len(serving) == 1
    assert client.complete(rolled.url, [[5, 6, 7]], max_tokens=4, ignore_eos=True)
    rolled.patch({"model": {"maxModelLen": 0}})
    rolled.wait_ready()
    assert rolled.uids(serving[0]["name"]) == old[serving[0]["name"]], "the gang that served was touched"
    assert {gang["name"] for gang in rolled.gangs()} == set(old)
    assert rolled.condition("Stalled")["status"] == "False"


def _holding(model: DeployedModel, kind: str) -> Object | None:
    condition = model.condition(kind)
    return condition if condition.get("status") == "True" else None


def variable(pod: Object, name: str) -> str | None:
    """Value of an environment variable of the worker's container."""
    container = next(item for item in pod["spec"]["containers"] if item["name"] == names.CONTAINER)
    return next((item.get("value") for item in container["env"] if item["name"] == name), None)


def check_no_gang_is_mixed(history: PodHistory) -> None:
    """Pods of one gang were of one template, at each moment."""
    for pods in history.states:
        for gang in {gang_of(pod) for pod in pods}:
            of_gang = [pod for pod in pods if gang_of(pod) == gang]
            assert {revision_of(pod) for pod in of_gang} == {gang.rpartition("-")[2]}
            assert len({variable(pod, "GENERATION") for pod in of_gang}) == 1


def check_some_gang_always_serves(history: PodHistory) -> None:
    """There was a Ready leader pod at each moment."""
    for pods in history.states:
        assert any(_serves(pod) for pod in pods), [pod["metadata"]["name"] for pod in pods]


def check_one_gang_at_a_time(history: PodHistory, *, gangs: int) -> None:
    """Without surge no gang came before another's pods were gone, and of all others none ended."""
    for pods in history.states:
        there = {gang_of(pod) for pod in pods}
        ending = {gang_of(pod) for pod in pods if is_terminating(pod)}
        assert len(there) <= gangs, sorted(there)
        assert len(there - ending) >= gangs - 1, sorted(there)


def _serves(pod: Object) -> bool:
    return pod["metadata"]["labels"][names.POD_INDEX] == "0" and is_ready(pod) and not is_terminating(pod)
