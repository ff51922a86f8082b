"""Random faults, late watches, an operator that dies anywhere: what must hold all the same."""

from random import Random
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support import scale
from support.operator_cluster import spec_with
from support.operator_faults import FaultyCluster
from tpmodel_operator import faults
from tpmodel_operator.api import Rollout
from tpmodel_operator.names import REBUILD_ANNOTATION
from tpmodel_operator.observed import NodeRecord

ROLLOUTS = (Rollout(), Rollout(max_unavailable=0, max_surge=1), Rollout(max_unavailable=2), Rollout(max_surge=1))
RECOVERY = {"maxRestarts": 6, "stabilityWindow": 100_000}
MODES = ("Restart", "InPlace")


def cluster_of(seed: int, **changes: Any) -> FaultyCluster:
    """A cluster whose gangs all serve."""
    cluster = FaultyCluster(
        spec=spec_with(scheduling={"deadNodeToleration": 30}, **changes),
        random=Random(seed),
    )
    cluster.nodes = {f"node-{index}": NodeRecord(name=f"node-{index}", ready=True) for index in range(4)}
    cluster.come_to_rest()
    assert cluster.status.state == "Ready"
    return cluster


class Chaos(RuleBasedStateMachine):
    """Everything that can go wrong, in any order; then it stops going wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = FaultyCluster()

    @initialize(
        seed=st.integers(0, 2**16),
        replicas=st.integers(1, 3),
        rollout=st.sampled_from(ROLLOUTS),
        pods=st.integers(1, 3),
        mode=st.sampled_from(MODES),
    )
    def install(self, seed: int, replicas: int, rollout: Rollout, pods: int, mode: str) -> None:
        self.cluster = cluster_of(
            seed,
            replicas=replicas,
            rollout=rollout.model_dump(),
            tensorParallelSize=pods,
            recovery=RECOVERY | {"mode": mode},
        )

    @rule(lag=st.integers(0, 8))
    def operator_runs(self, lag: int) -> None:
        self.cluster.run_operator(lag=lag)

    @rule(lag=st.integers(0, 4), actions=st.integers(0, 5))
    def operator_dies_between_actions(self, lag: int, actions: int) -> None:
        self.cluster.run_operator(lag=lag, dies_after=actions)

    @rule(lag=st.integers(0, 4))
    def operator_dies_before_it_writes(self, lag: int) -> None:
        self.cluster.run_operator(lag=lag, writes=False)

    @rule(steps=st.integers(1, 8), seconds=st.sampled_from((0, 1, 10, 40, 200)))
    def cluster_moves(self, steps: int, seconds: int) -> None:
        for _ in range(steps):
            self.cluster.move()
        self.cluster.wait(seconds)

    @precondition(lambda self: self.cluster.pods)
    @rule(data=st.data(), exit_code=st.sampled_from((0, 1, 75, 137)))
    def a_container_ends(self, data: st.DataObject, exit_code: int) -> None:
        pod = self.cluster.pods[data.draw(st.sampled_from(sorted(self.cluster.pods)))]
        if pod.running:
            self.cluster.end_container(pod, exit_code, "as it happens")

    @precondition(lambda self: self.cluster.pods)
    @rule(data=st.data(), grace=st.sampled_from((0, 5, 135)))
    def a_pod_is_deleted(self, data: st.DataObject, grace: int) -> None:
        self.cluster.delete_pod(data.draw(st.sampled_from(sorted(self.cluster.pods))), grace)

    @precondition(lambda self: sum(node.ready for node in self.cluster.nodes.values()) > 2)
    @rule(data=st.data())
    def a_node_dies(self, data: st.DataObject) -> None:
        alive = sorted(name for name, node in self.cluster.nodes.items() if node.ready)
        self.cluster.fail_node(data.draw(st.sampled_from(alive)))

    @rule()
    def all_nodes_are_back(self) -> None:
        self.cluster.nodes = {name: NodeRecord(name=name, ready=True) for name in self.cluster.nodes}

    @precondition(lambda self: self.cluster.statefulsets)
    @rule(data=st.data())
    def a_leader_hangs(self, data: st.DataObject) -> None:
        gang = data.draw(st.sampled_from(sorted(self.cluster.statefulsets)))
        self.cluster.hung |= {pod.uid for pod in self.cluster.pods.values() if pod.gang == gang and pod.index == 0}

    @precondition(lambda self: self.cluster.statefulsets)
    @rule(data=st.data())
    def a_token_is_lost(self, data: st.DataObject) -> None:
        self.cluster.tokens_missing.add(data.draw(st.sampled_from(sorted(self.cluster.statefulsets))))

    @rule(seconds=st.sampled_from((60, 90, 120)))
    def the_spec_changes(self, seconds: int) -> None:
        self.cluster.edit(drain_timeout=seconds)

    @rule()
    def a_rebuild_is_asked_for(self) -> None:
        number = int(self.cluster.annotations.get(REBUILD_ANNOTATION, "0")) + 1
        self.cluster.annotations = {REBUILD_ANNOTATION: str(number)}

    @rule(replicas=st.integers(0, 4))
    def the_model_is_scaled(self, replicas: int) -> None:
        self.cluster.edit(replicas=replicas)

    @invariant()
    def all_holds(self) -> None:
        self.cluster.check()

    def teardown(self) -> None:
        cluster = self.cluster
        cluster.come_to_rest()
        cluster.check()
        answered = faults.ANSWERS[cluster.spec.recovery.mode]
        restarted = [entry.last_restart.cause for entry in cluster.status.gangs if entry.last_restart is not None]
        assert all(cause in answered for cause in restarted), "restarted for what the mode leaves to others"
        told = {entry.name: entry.rebuilds_requested for entry in cluster.status.gangs}
        assert {name: cluster.rebuilds.get(name, 0) for name in told} == told
        failed = [entry for entry in cluster.status.gangs if entry.failure is not None]
        assert all(entry.restarts == RECOVERY["maxRestarts"] for entry in failed), "failed with budget left"
        if not failed:
            assert cluster.status.state == ("Ready" if cluster.spec.replicas else "ScaledToZero")
            assert cluster.status.ready_replicas == cluster.status.updated_replicas == cluster.spec.replicas
            assert len(cluster.statefulsets) == cluster.spec.replicas


Chaos.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.filter_too_much),
)
TestChaos = Chaos.TestCase


def inject(cluster: FaultyCluster, fault: str, index: int) -> None:
    """One fault of the gang with index 0."""
    pod = cluster.pod(index)
    match fault:
        case "deleted":
            cluster.delete_pod(pod.uid)
        case "removed":
            cluster.delete_pod(pod.uid, 0)
        case "node":
            cluster.fail_node(pod.node)
        case "hang":
            cluster.hung.add(cluster.pod(0).uid)
        case "token":
            cluster.tokens_missing.add(cluster.gang_status().name)
        case _:
            cluster.end_container(pod, int(fault), "as it happens")


@settings(max_examples=scale.OPERATOR_SINGLE_FAULTS, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    pods=st.integers(1, 4),
    mode=st.sampled_from(MODES),
    fault=st.sampled_from(("deleted", "removed", "node", "hang", "token", "0", "1", "75", "137")),
    schedule=st.lists(
        st.tuples(st.integers(0, 6), st.one_of(st.none(), st.integers(0, 5)), st.booleans(), st.integers(0, 4)),
        max_size=12,
    ),
    data=st.data(),
)
def test_one_fault_is_one_attempt_or_none_whatever_the_operator_and_the_cluster_do_meanwhile(
    seed: int, pods: int, mode: str, fault: str, schedule: list[tuple[int, int | None, bool, int]], data: st.DataObject
):
    """The fault's consequences (peers that end, pods made again too early) belong to it. In mode InPlace most faults
    are no attempt, and no other pod is deleted."""
    cluster = cluster_of(seed, tensorParallelSize=pods, recovery={"mode": mode})
    others = {pod.uid for pod in cluster.pods.values()}
    inject(cluster, fault, data.draw(st.integers(0, pods - 1)))
    if fault == "hang":
        cluster.move()
        cluster.run_operator()
        cluster.wait(1000)
    if fault == "token":
        cluster.run_operator()
    if fault == "node":
        cluster.wait(31)
        while cluster.taint_step():
            pass
        cluster.run_operator()
    for lag, dies_after, writes, steps in schedule:
        cluster.run_operator(lag=lag, dies_after=dies_after, writes=writes)
        for _ in range(steps):
            cluster.move()
        cluster.check()
    cluster.come_to_rest()
    gang = cluster.gang_status()
    in_place = mode == "InPlace" and fault not in ("75", "hang", "token")
    restarts = 0 if in_place else 1
    assert (gang.attempt, gang.restarts_total, gang.phase) == (1 + restarts, restarts, "Serving")
    survivors = others & {pod.uid for pod in cluster.pods.values()}
    if in_place:
        gone = 1 if fault in ("deleted", "removed", "node") else 0
        same_node = fault == "node" and len(survivors) < len(others) - 1
        assert same_node or len(survivors) == len(others) - gone
    else:
        assert not survivors


@settings(max_examples=scale.OPERATOR_ROLLOUTS, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    replicas=st.integers(1, 4),
    rollout=st.sampled_from(ROLLOUTS),
    schedule=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=20, max_size=80),
)
def test_a_rollout_without_faults_never_has_more_gangs_away_or_above_than_it_may(
    seed: int, replicas: int, rollout: Rollout, schedule: list[tuple[int, int]]
):
    cluster = cluster_of(seed, replicas=replicas, rollout=rollout.model_dump())
    cluster.edit(drain_timeout=60)
    for lag, steps in schedule:
        cluster.run_operator(lag=lag)
        for _ in range(steps):
            cluster.move()
            ready = sum(pod.ready and pod.deleting_since is None and pod.index == 0 for pod in cluster.pods.values())
            assert ready >= replicas - rollout.max_unavailable
            existing = {*cluster.statefulsets, *(pod.gang for pod in cluster.pods.values())}
            assert len(existing) <= replicas + rollout.max_surge
    cluster.come_to_rest()
    assert all(entry.attempt == 1 for entry in cluster.status.gangs)
    assert cluster.status.updated_replicas == cluster.status.ready_replicas == replicas
