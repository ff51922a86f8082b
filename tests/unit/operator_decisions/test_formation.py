"""Until every container of an attempt has started, nothing but the deadline, 64 or a lost token ends it."""

import pytest

from support.operator_cluster import Cluster, spec_with
from tpmodel_operator.actions import DeletePod, WriteAttempt


def forming() -> Cluster:
    """One gang of two pods; neither container has started."""
    cluster = Cluster(spec=spec_with(recovery={"formationDeadline": 600}))
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.reconcile()
    return cluster


def restarts(cluster: Cluster) -> int:
    return cluster.gang_status().restarts_total


def test_a_pod_that_is_deleted_before_its_container_started_is_no_fault():
    cluster = forming()
    cluster.delete_pod(cluster.pod(1).uid)
    cluster.reconcile()
    cluster.end_pods()
    cluster.statefulset_controller()
    cluster.reconcile()
    assert restarts(cluster) == 0
    assert cluster.gang_status().phase == "Forming"


@pytest.mark.parametrize("exit_code", [1, 75, 137])
def test_a_container_that_ends_while_another_pod_waits_for_a_node_is_no_fault(exit_code: int):
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    cluster.end_container(cluster.pod(0), exit_code)
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.change(cluster.pod(1), running=True)
    cluster.reconcile()
    cluster.reconcile()
    assert restarts(cluster) == 0
    assert cluster.gang_status().formed


def test_an_end_before_the_last_container_started_is_no_fault_even_if_nobody_saw_it_in_time():
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    cluster.end_container(cluster.pod(0), 75)
    cluster.restart_container(cluster.pod(0))
    cluster.change(cluster.pod(1), running=True)
    cluster.reconcile()
    cluster.reconcile()
    assert restarts(cluster) == 0


def test_a_container_that_is_down_when_the_last_one_has_started_is_a_fault():
    cluster = forming()
    for index in (0, 1):
        cluster.change(cluster.pod(index), running=True)
        cluster.end_container(cluster.pod(index), 1)
    cluster.reconcile()
    assert restarts(cluster) == 1


def test_a_container_that_went_down_before_the_last_pod_was_even_made_is_no_fault():
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    cluster.end_container(cluster.pod(0), 75)
    cluster.wait(10)
    cluster.delete_pod(cluster.pod(1).uid, 0)
    cluster.statefulset_controller()
    cluster.change(cluster.pod(1), running=True)
    cluster.reconcile()
    assert restarts(cluster) == 0
    assert cluster.gang_status().formed


def test_an_end_that_was_seen_while_forming_is_not_brought_up_later():
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    cluster.change(cluster.pod(1), running=True)
    cluster.reconcile()
    assert restarts(cluster) == 0


def test_the_deadline_counts_from_the_last_change_of_a_pod():
    cluster = forming()
    cluster.wait(500)
    cluster.change(cluster.pod(1), waiting_reason="ImagePullBackOff")
    cluster.wait(500)
    decision = cluster.reconcile()
    assert restarts(cluster) == 0
    assert decision.requeue_after == 100


def test_a_gang_that_waits_past_the_deadline_restarts_and_says_for_what_it_waited():
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    cluster.change(cluster.pod(1), waiting_reason="ImagePullBackOff")
    cluster.wait(600)
    cluster.reconcile()
    last = cluster.gang_status().last_restart
    assert last is not None
    assert last.cause == "FormationDeadline"
    assert f"{cluster.pod(1).name} (ImagePullBackOff)" in last.message
    assert cluster.pod(0).name not in last.message


def test_a_pod_that_crashes_for_ever_does_not_put_the_deadline_off():
    cluster = forming()
    cluster.change(cluster.pod(0), running=True)
    for _ in range(6):
        cluster.end_container(cluster.pod(0), 1)
        cluster.reconcile()
        cluster.wait(100)
        cluster.restart_container(cluster.pod(0))
        cluster.reconcile()
    last = cluster.gang_status().last_restart
    assert last is not None
    assert last.cause == "FormationDeadline"


def test_the_deadline_stops_once_every_container_runs():
    cluster = forming()
    cluster.start_pods(ready=False)
    decision = cluster.reconcile()
    assert decision.requeue_after is None
    cluster.wait(100_000)
    cluster.reconcile()
    assert restarts(cluster) == 0
    assert cluster.gang_status().phase == "Loading"


def test_pods_that_the_statefulset_cannot_make_count_against_the_deadline_too():
    cluster = Cluster(spec=spec_with(recovery={"formationDeadline": 600}))
    cluster.reconcile()
    cluster.wait(600)
    cluster.reconcile()
    last = cluster.gang_status().last_restart
    assert last is not None
    assert "2 pods that do not exist" in last.message


def test_after_a_restart_the_deadline_begins_anew():
    cluster = forming()
    cluster.wait(600)
    cluster.reconcile()
    cluster.end_pods()
    cluster.statefulset_controller()
    decision = cluster.reconcile()
    assert decision.requeue_after == 600
    cluster.wait(599)
    cluster.reconcile()
    assert restarts(cluster) == 1


def test_a_leader_that_has_not_been_ready_yet_may_take_as_long_as_loading_takes():
    cluster = forming()
    cluster.start_pods(ready=False)
    cluster.reconcile()
    cluster.wait(7200)
    cluster.reconcile()
    assert restarts(cluster) == 0


def test_a_lost_config_map_is_written_again_while_pods_wait_for_it():
    cluster = forming()
    cluster.attempts.clear()
    decision = cluster.decide()
    assert WriteAttempt(gang=cluster.gang_status().name, attempt=1) in decision.actions
    assert not any(isinstance(action, DeletePod) for action in decision.actions)
