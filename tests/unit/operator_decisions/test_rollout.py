"""Rollouts of whole models, pass by pass."""

from collections import Counter
from dataclasses import replace

import pytest

from support.operator_cluster import Cluster, serving
from tpmodel_operator.actions import DeleteGang, EnsureGang
from tpmodel_operator.api import Recovery, Rollout

SURGE = Rollout(max_unavailable=0, max_surge=1)


def one_pass(cluster: Cluster) -> None:
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.end_pods()
    cluster.start_pods()


def revisions(cluster: Cluster) -> set[str]:
    return {gang.revision for gang in cluster.status.gangs}


@pytest.mark.parametrize("rollout", [Rollout(), Rollout(max_unavailable=2), SURGE, Rollout(max_surge=2)])
def test_a_change_replaces_all_gangs_and_never_disturbs_more_than_it_may(rollout: Rollout):
    cluster = serving(replicas=4, rollout=rollout.model_dump())
    (before,) = revisions(cluster)
    cluster.edit(drain_timeout=60)
    for _ in range(60):
        one_pass(cluster)
        assert cluster.status.ready_replicas >= 4 - rollout.max_unavailable
        assert len(cluster.status.gangs) <= 4 + rollout.max_surge
    assert before not in revisions(cluster)
    assert (cluster.status.state, cluster.status.updated_replicas) == ("Ready", 4)


def test_no_statefulset_is_changed_and_no_gang_is_of_two_revisions():
    cluster = serving(replicas=2)
    before = dict(cluster.statefulsets)
    cluster.edit(drain_timeout=60)
    for _ in range(30):
        for name, statefulset in cluster.statefulsets.items():
            assert before.setdefault(name, statefulset) == statefulset
        one_pass(cluster)
    assert all(name.endswith(cluster.status.revision) for name in cluster.statefulsets)


def test_fields_that_pods_do_not_depend_on_replace_nothing():
    cluster = serving(replicas=2)
    kept = set(cluster.pods)
    cluster.edit(rollout=SURGE, disruption_budget=2, recovery=Recovery(mode="Restart", max_restarts=3))
    cluster.settle()
    assert set(cluster.pods) == kept


def test_tensor_parallel_size_may_change():
    cluster = serving(replicas=2)
    cluster.edit(tensor_parallel_size=4)
    cluster.settle(60)
    assert Counter(pod.gang for pod in cluster.pods.values()).values()
    assert all(statefulset.pods == 4 for statefulset in cluster.statefulsets.values())


def fail_new_gangs(cluster: Cluster, old: set[str]) -> None:
    for _ in range(20):
        cluster.reconcile()
        cluster.statefulset_controller()
        cluster.end_pods()
        for pod in list(cluster.pods.values()):
            if pod.gang not in old and pod.deleting_since is None:
                cluster.end_container(pod, 64, "no such option")


def test_a_stalled_rollout_leaves_the_old_gangs_serving():
    cluster = serving(replicas=3)
    old = set(cluster.statefulsets)
    cluster.edit(drain_timeout=60)
    fail_new_gangs(cluster, old)
    assert cluster.status.ready_replicas == 2
    assert cluster.condition("Progressing") == ("False", "RolloutStalled")
    assert cluster.condition("Stalled") == ("True", "ConfigurationRefused")
    assert cluster.status.state == "Stalled"
    assert len(cluster.statefulsets) == 3


def test_setting_the_spec_back_heals_a_stalled_rollout_and_keeps_the_gangs_that_are_left():
    cluster = serving(replicas=3)
    old = set(cluster.statefulsets)
    before = cluster.spec
    cluster.edit(drain_timeout=60)
    fail_new_gangs(cluster, old)
    kept = {pod.uid for pod in cluster.pods.values() if pod.gang in old}
    cluster.spec, cluster.generation = before, cluster.generation + 1
    cluster.settle(40)
    assert kept <= set(cluster.pods)
    assert (cluster.status.state, cluster.status.ready_replicas) == ("Ready", 3)


def test_a_new_gang_that_misses_its_formation_deadline_stops_the_rollout_until_it_is_ready():
    cluster = serving(replicas=2, recovery={"formationDeadline": 600}, rollout={"maxUnavailable": 2})
    cluster.edit(drain_timeout=60, rollout=Rollout())
    cluster.reconcile()
    cluster.end_pods()
    cluster.reconcile()
    cluster.wait(600)
    cluster.reconcile()
    assert cluster.condition("Progressing") == ("False", "RolloutStalled")
    assert cluster.condition("Stalled") == ("True", "FormationDeadline")
    cluster.settle(40)
    assert (cluster.status.state, cluster.status.updated_replicas) == ("Ready", 2)


def test_a_gang_that_is_removed_drains_and_its_pods_are_not_deleted_one_by_one():
    cluster = serving(replicas=2)
    cluster.edit(drain_timeout=60)
    decision = cluster.reconcile()
    assert [type(action) for action in decision.actions if isinstance(action, DeleteGang | EnsureGang)] == [DeleteGang]
    assert cluster.deletions == []
    assert Counter(gang.phase for gang in cluster.status.gangs) == {"Serving": 1, "Draining": 1}


def test_a_removal_that_did_not_happen_is_repeated():
    cluster = serving(replicas=2)
    cluster.edit(drain_timeout=60)
    first = cluster.decide()
    cluster.status = first.status
    assert cluster.decide().actions == first.actions


def test_a_removal_that_is_under_way_is_not_repeated():
    cluster = serving()
    cluster.edit(replicas=0)
    for name, statefulset in cluster.statefulsets.items():
        cluster.statefulsets[name] = replace(statefulset, deleting=True)
    decision = cluster.reconcile()
    assert not any(isinstance(action, DeleteGang) for action in decision.actions)
    assert cluster.gang_status().phase == "Draining"


def test_a_spec_set_back_before_the_removal_happened_keeps_the_gang():
    cluster = serving(replicas=2)
    before = cluster.spec
    cluster.edit(drain_timeout=60)
    cluster.status = cluster.decide().status
    cluster.spec, cluster.generation = before, cluster.generation + 1
    kept = set(cluster.pods)
    cluster.settle()
    assert set(cluster.pods) == kept
    assert cluster.status.state == "Ready"


def test_pods_of_a_leaving_gang_on_a_dead_node_are_freed_after_the_toleration():
    cluster = serving(scheduling={"deadNodeToleration": 30})
    pod = cluster.pod(1)
    cluster.fail_node(pod.node)
    cluster.edit(replicas=0)
    cluster.reconcile()
    assert cluster.decide().requeue_after == 30
    cluster.wait(30)
    cluster.reconcile()
    assert pod.uid not in cluster.pods


def test_a_third_revision_replaces_a_second_one_that_never_became_ready():
    cluster = serving(replicas=2)
    old = set(cluster.statefulsets)
    cluster.edit(drain_timeout=60)
    fail_new_gangs(cluster, old)
    cluster.edit(drain_timeout=90)
    cluster.settle(40)
    assert len(revisions(cluster)) == 1
    assert cluster.status.state == "Ready"


def test_a_planned_gang_of_a_revision_that_is_no_longer_wanted_is_forgotten():
    cluster = Cluster()
    cluster.status = cluster.decide().status
    cluster.edit(drain_timeout=60)
    cluster.settle()
    assert len(cluster.statefulsets) == 1
    assert cluster.status.state == "Ready"
