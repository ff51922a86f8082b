"""The budget of evictions, as the API server counts it: healthy pods minus those that must stay healthy."""

import pytest

from support.operator_cluster import Cluster, serving


def allowed(cluster: Cluster) -> int:
    """disruptionsAllowed of the PodDisruptionBudget."""
    assert cluster.budget is not None
    expected = sum(statefulset.pods for statefulset in cluster.statefulsets.values())
    healthy = sum(pod.ready and pod.deleting_since is None for pod in cluster.pods.values())
    return max(0, healthy - (expected - cluster.budget))


def evict(cluster: Cluster, gang: int, index: int = 1) -> bool:
    """Evicts one pod of a gang, with unhealthyPodEvictionPolicy AlwaysAllow; whether it passed (else: 429)."""
    pod = cluster.pod(index, gang)
    if pod.ready and allowed(cluster) == 0:
        return False
    cluster.delete_pod(pod.uid)
    return True


def test_of_three_evictions_in_three_gangs_at_once_one_passes():
    cluster = serving(replicas=3)
    assert [evict(cluster, gang) for gang in range(3)] == [True, False, False]


def test_a_budget_of_two_gangs_lets_two_pass():
    cluster = serving(replicas=3, disruptionBudget=2)
    assert [evict(cluster, gang) for gang in range(3)] == [True, True, False]


def test_no_other_gang_is_disturbed_while_one_restarts():
    cluster = serving(replicas=3)
    assert evict(cluster, 0)
    cluster.end_pods()
    cluster.reconcile()
    assert not evict(cluster, 1)
    cluster.settle()
    assert evict(cluster, 1)


def test_the_other_pods_of_a_gang_that_is_down_can_be_evicted_those_of_others_cannot():
    cluster = serving(replicas=2)
    assert evict(cluster, 0)
    cluster.change(cluster.pod(0, 0), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    assert not evict(cluster, 1, index=0)
    assert evict(cluster, 0, index=0)


def test_a_failed_gang_does_not_use_up_the_budget_so_a_drain_of_the_others_ends():
    cluster = serving(replicas=3)
    cluster.end_container(cluster.pod(1, 0), 64)
    cluster.end_container(cluster.pod(0, 0), 1)
    cluster.reconcile()
    assert allowed(cluster) == 1
    assert evict(cluster, 1)
    assert not evict(cluster, 2)


def test_a_failed_gang_whose_worker_pods_are_ready_gives_no_extra_budget():
    cluster = serving(replicas=3)
    cluster.end_container(cluster.pod(0, 0), 64)
    cluster.reconcile()
    assert allowed(cluster) == 1


@pytest.mark.parametrize("replicas", [0, 1])
def test_a_single_gang_has_no_budget_object(replicas: int):
    assert serving(replicas=replicas).budget is None


def test_a_budget_of_zero_forbids_evictions():
    cluster = serving(replicas=2, disruptionBudget=0)
    assert not evict(cluster, 0)
