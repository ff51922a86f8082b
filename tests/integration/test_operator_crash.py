"""The operator is SIGKILLed between any two writes of a coordinated restart: the next one finishes it, and the
gang is at exactly one attempt more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import dying_operator
from support.crd_server import MODELS, KubeApi, serving, tpmodel
from support.operator_process import Operator, operating, wait_for
from support.simulated_cluster import SimulatedCluster

STEPS = 5
"""Status, ConfigMap, the deletes of two pods, and the status that says it is over."""


@pytest.fixture(scope="module")
def api() -> Iterator[KubeApi]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def cluster(api: KubeApi) -> Iterator[SimulatedCluster]:
    with SimulatedCluster(api).running() as simulated:
        yield simulated


def gang(api: KubeApi, name: str) -> dict[str, Any]:
    gangs = api.call("GET", f"{MODELS}/{name}").get("status", {}).get("gangs", [])
    return gangs[0] if gangs else {}


def dying(api: KubeApi, folder: Path, *, step: int, after: bool) -> Operator:
    environment = {"TPMODEL_TEST_DIE_AT": str(step), "TPMODEL_TEST_DIE_AFTER": str(int(after))}
    environment["PYTHONPATH"] = str(Path(dying_operator.__file__).parents[1])
    command = [sys.executable, dying_operator.__file__]
    return Operator(api.api.kubeconfig, folder / "dying", command=command, environment=environment)


# Before a write is as good as after the one before it.
@pytest.mark.parametrize(("step", "after"), [(1, False), *((step, True) for step in range(1, STEPS + 1))])
def test_a_restart_is_finished_by_the_next_process_with_one_attempt(
    api: KubeApi, cluster: SimulatedCluster, tmp_path: Path, step: int, after: bool
):
    name = f"step-{step}-{'after' if after else 'before'}"
    with operating(dying(api, tmp_path, step=step, after=after)) as first:
        api.create(tpmodel(name, device="cpu", tensorParallelSize=2))
        wait_for(lambda: gang(api, name).get("ready"), seconds=20, what="a serving gang")
        before = cluster.uids(name)
        cluster.end_container(cluster.pods(name)[1], 75, "rank 1: killed by the test")
        wait_for(lambda: first.process.poll() is not None, seconds=20, what="the operator's death")
        assert first.process.returncode == -9
    with operating(Operator(api.api.kubeconfig, tmp_path / "next")):
        wait_for(lambda: len(cluster.uids(name) - before) == 2, seconds=20, what="two new pods")
        wait_for(
            lambda: gang(api, name).get("ready") and not gang(api, name).get("restart"), seconds=20, what="Ready again"
        )
        finished = gang(api, name)
        assert (finished["attempt"], finished["restartsTotal"]) == (2, 1)
        assert finished["lastRestart"]["message"].endswith("rank 1: killed by the test")
        assert not before & cluster.uids(name)
        config_map = api.call("GET", f"/api/v1/namespaces/default/configmaps/{finished['name']}-attempt")
        assert config_map["data"] == {"attempt": "2"}
    api.call("DELETE", f"{MODELS}/{name}")
