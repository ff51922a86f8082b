"""Evictions disturb no more gangs than the budget says, and a broken gang blocks no drain."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Iterator

import pytest

from tests.cluster.kubectl import Kubectl, KubectlError, Object
from tests.cluster.local import LocalCluster
from tests.e2e.conftest import CLIENT_NODE
from tests.e2e.support.models import READY_SECONDS, DeployedModel, deployed, gang_of, node_of

MODEL = "guarded"
GANGS = 3
BUDGET_SECONDS = 30.0
"""For the budget to be made and its controller to count the pods."""
DRAIN_SECONDS = 400.0
"""For a node with pods of several gangs: each gang that serves is Ready again before the next one's pod may go."""


@pytest.fixture(scope="module")
def guarded(cluster: LocalCluster, models: Kubectl) -> Iterator[DeployedModel]:
    """Three gangs of two pods, none on the clients' node. `cluster`: nodes are drained."""
    away = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [CLIENT_NODE]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [away]}}}
    with deployed(
        models,
        MODEL,
        replicas=GANGS,
        drainTimeout=5,
        recovery={"backoffBase": 0, "backoffLimit": 0},
        scheduling={"affinity": affinity},
    ) as model:
        yield model


def test_of_concurrent_evictions_in_three_gangs_one_passes(guarded: DeployedModel) -> None:
    guarded.until(lambda: _allowed(guarded) == 1, what="a budget that allows one", seconds=BUDGET_SECONDS)
    worker_of_each = [f"{gang['name']}-1" for gang in guarded.gangs()]
    assert len(worker_of_each) == GANGS
    with concurrent.futures.ThreadPoolExecutor(GANGS) as pool:
        answers = list(pool.map(lambda name: _evict(guarded.kubectl, name), worker_of_each))
    refusals = [answer for answer in answers if answer]
    assert len(refusals) == GANGS - 1, answers
    for refusal in refusals:
        # kubectl's name for 429.
        assert "TooManyRequests" in refusal
        assert "violate the pod's disruption budget" in refusal
    guarded.until(lambda: sum(gang["attempt"] for gang in guarded.gangs()) > GANGS, what="a restart", seconds=60)
    guarded.wait_ready()
    assert sorted(gang["attempt"] for gang in guarded.gangs()) == [1, 1, 2]


def test_a_drain_ends_while_a_gang_is_failed(guarded: DeployedModel) -> None:
    # A context that the checkpoint does not have: the first gang of the new template ends with 64, the others stay.
    guarded.patch({"model": {"maxModelLen": 1_000_000}})
    broken = guarded.until(lambda: _failed(guarded), what="a Failed gang", seconds=READY_SECONDS)
    node = node_of(guarded.pods(broken)[0])
    others = {gang_of(pod) for pod in guarded.pods() if node_of(pod) == node} - {broken}
    assert others, "the node has pods of gangs that serve, whose budget the broken gang must not use up"
    try:
        guarded.kubectl.run("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", seconds=DRAIN_SECONDS)
        assert [pod for pod in guarded.pods() if node_of(pod) == node] == []
        guarded.until(lambda: _ready(guarded) == GANGS - 1, what="all gangs ready but the broken one")
        assert guarded.gang(broken)["failure"]["reason"] == "ConfigurationRefused"
    finally:
        guarded.kubectl.run("uncordon", node)


def _failed(model: DeployedModel) -> str | None:
    return next((gang["name"] for gang in model.gangs() if gang["phase"] == "Failed"), None)


def _ready(model: DeployedModel) -> int:
    return sum(gang["ready"] for gang in model.gangs())


def _allowed(model: DeployedModel) -> int:
    """Evictions that the budget allows now; 0 until its controller has seen all pods."""
    budget = model.kubectl.find("pdb", MODEL) or {}
    status = budget.get("status", {})
    return status.get("disruptionsAllowed", 0) if status.get("expectedPods") == 2 * GANGS else 0


def _evict(kubectl: Kubectl, pod: str) -> str:
    """What the API server answers: "" where the pod is evicted."""
    body: Object = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod}}
    path = f"/api/v1/namespaces/{kubectl.namespace}/pods/{pod}/eviction"
    try:
        kubectl.run("create", "--raw", path, "--filename=-", standard_input=json.dumps(body))
    except KubectlError as error:
        return error.output
    return ""
