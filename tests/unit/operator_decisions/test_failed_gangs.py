"""Failed: at once after 64, otherwise when the budget is spent; and how a gang gets out of it."""

import pytest

from support.operator_cluster import Cluster, serving, spec_with
from tpmodel_operator.actions import DeletePod
from tpmodel_operator.api import Recovery


def crash_until_failed(cluster: Cluster) -> None:
    for _ in range(20):
        cluster.end_container(cluster.pod(0), 1, "out of memory")
        cluster.reconcile()
        if cluster.gang_status().failure is not None:
            return
        cluster.wait(1000)
        cluster.settle()
    raise AssertionError("it never failed")


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_gang_is_failed_after_as_many_restarts_as_its_budget_has(budget: int):
    cluster = serving(recovery={"maxRestarts": budget, "stabilityWindow": 100_000})
    crash_until_failed(cluster)
    gang = cluster.gang_status()
    assert gang.failure is not None
    assert (gang.failure.reason, gang.failure.cause, gang.failure.exit_code) == ("BudgetSpent", "ContainerEnded", 1)
    assert "out of memory" in gang.failure.message
    assert (gang.restarts_total, gang.attempt, gang.phase) == (budget, budget + 1, "Failed")


def test_a_failed_gang_makes_the_model_stalled_at_once():
    cluster = serving(recovery={"maxRestarts": 0})
    crash_until_failed(cluster)
    assert cluster.condition("Stalled") == ("True", "BudgetSpent")
    assert cluster.condition("Progressing") == ("False", "RolloutStalled")
    assert cluster.condition("Degraded") == ("True", "GangFailed")
    assert cluster.condition("Ready") == ("False", "NoGangReady")
    assert cluster.status.state == "Failed"


def test_the_pods_of_a_failed_gang_are_left_alone():
    cluster = serving(recovery={"maxRestarts": 0})
    crash_until_failed(cluster)
    cluster.restart_container(cluster.pod(0))
    cluster.end_container(cluster.pod(0), 75)
    del cluster.pods[cluster.pod(1).uid]
    cluster.wait(100_000)
    decision = cluster.reconcile()
    assert not any(isinstance(action, DeletePod) for action in decision.actions)
    assert cluster.gang_status().attempt == 1


@pytest.mark.parametrize("formed", [True, False])
def test_64_fails_at_once_without_a_restart(formed: bool):
    cluster = Cluster(spec=spec_with())
    cluster.reconcile()
    cluster.statefulset_controller()
    if formed:
        cluster.settle()
    cluster.end_container(cluster.pod(0), 64, "unknown engine option block_sise")
    decision = cluster.reconcile()
    failure = cluster.gang_status().failure
    assert failure is not None
    assert (failure.reason, failure.exit_code) == ("ConfigurationRefused", 64)
    assert "block_sise" in failure.message
    assert not any(isinstance(action, DeletePod) for action in decision.actions)
    assert cluster.gang_status().attempt == 1
    assert cluster.condition("Stalled") == ("True", "ConfigurationRefused")


def test_64_is_graver_than_any_other_fault():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.end_container(cluster.pod(1), 64)
    cluster.reconcile()
    assert cluster.gang_status().phase == "Failed"


def test_64_during_a_backoff_ends_the_restart():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.end_container(cluster.pod(0), 64)
    cluster.reconcile()
    cluster.wait(1000)
    decision = cluster.reconcile()
    assert cluster.gang_status().phase == "Failed"
    assert cluster.gang_status().restart is None
    assert not any(isinstance(action, DeletePod) for action in decision.actions)


def test_a_failed_gang_that_becomes_ready_by_itself_is_well_again():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 64, "token refused by the hub")
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.start_pods()
    cluster.reconcile()
    assert (cluster.gang_status().failure, cluster.gang_status().phase) == (None, "Serving")
    assert cluster.condition("Stalled")[0] == "False"
    assert "GangRecovered" in cluster.reasons()
    cluster.settle()


def test_another_64_of_the_same_pod_fails_the_gang_again():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 64)
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.start_pods()
    cluster.reconcile()
    cluster.end_container(cluster.pod(0), 64)
    cluster.reconcile()
    assert cluster.gang_status().phase == "Failed"


def test_a_larger_budget_lets_a_failed_gang_go_on():
    cluster = serving(recovery={"maxRestarts": 1})
    crash_until_failed(cluster)
    cluster.edit(recovery=Recovery(mode="Restart", max_restarts=2))
    cluster.reconcile()
    cluster.wait(30)
    cluster.settle()
    assert (cluster.gang_status().phase, cluster.gang_status().attempt) == ("Serving", 3)


def test_an_edit_that_leaves_the_pods_as_they_are_does_not_heal_64():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 64)
    cluster.reconcile()
    cluster.edit(disruption_budget=0)
    cluster.reconcile()
    assert cluster.gang_status().phase == "Failed"


def test_an_edit_of_what_pods_depend_on_replaces_a_failed_gang():
    cluster = serving(recovery={"maxRestarts": 0})
    crash_until_failed(cluster)
    cluster.edit(drain_timeout=60)
    cluster.settle()
    assert cluster.status.state == "Ready"
    assert cluster.gang_status().attempt == 1
    assert cluster.condition("Stalled")[0] == "False"
