"""Coordinated restarts, step by step, and what an operator that dies between two steps leaves to the next one."""

import pytest

from support.operator_cluster import Cluster, serving
from tpmodel_operator import restarts
from tpmodel_operator.actions import DeletePod, EnsureModelChildren, WriteAttempt
from tpmodel_operator.api import Recovery, Restart


def faulty(**changes: object) -> Cluster:
    """A gang that has served, one of whose containers has ended with 75."""
    cluster = serving(**changes)
    cluster.end_container(cluster.pod(1), 75, "rank 1 hangs")
    return cluster


def uids(cluster: Cluster) -> set[str]:
    return set(cluster.pods)


def under_way(cluster: Cluster) -> Restart:
    restart = cluster.gang_status().restart
    assert restart is not None
    return restart


def test_the_attempt_is_raised_before_any_pod_is_deleted_and_all_pods_are():
    cluster = faulty()
    decision = cluster.decide()
    gang = decision.status.gangs[0]
    written, *deleted, children = decision.actions
    assert written == WriteAttempt(gang=gang.name, attempt=2)
    assert {action.uid for action in deleted if isinstance(action, DeletePod)} == uids(cluster)
    assert isinstance(children, EnsureModelChildren)


def test_status_knows_the_whole_restart_before_its_first_action():
    cluster = faulty()
    gang = cluster.decide().status.gangs[0]
    assert gang.restart is not None
    assert (gang.attempt, gang.restart.attempt, gang.phase) == (2, 2, "Restarting")
    assert set(gang.restart.doomed) == uids(cluster)
    assert (gang.restart.cause, gang.restart.exit_code) == ("RestartRequested", 75)


def test_doomed_pods_get_a_short_grace_period():
    cluster = faulty()
    cluster.reconcile()
    assert {deletion.grace_seconds for deletion in cluster.deletions} == {restarts.GRACE_SECONDS}


def test_a_pod_that_drains_slowly_is_hurried_when_its_gang_restarts():
    cluster = serving()
    cluster.delete_pod(cluster.pod(0).uid, 135)
    cluster.end_container(cluster.pod(1), 75)
    cluster.reconcile()
    assert cluster.pod(0).grace_seconds == restarts.GRACE_SECONDS


def test_a_deletion_that_was_accepted_is_not_repeated():
    cluster = faulty()
    cluster.reconcile()
    decision = cluster.decide()
    assert not any(isinstance(action, DeletePod | WriteAttempt) for action in decision.actions)


def test_a_restart_is_over_when_no_doomed_pod_exists():
    cluster = faulty()
    cluster.reconcile()
    del cluster.pods[cluster.pod(1).uid]
    cluster.reconcile()
    assert under_way(cluster).attempt == 2
    cluster.end_pods()
    cluster.reconcile()
    assert cluster.gang_status().restart is None
    assert cluster.gang_status().attempt == 2


def test_pods_made_meanwhile_are_of_the_new_attempt_and_stay():
    cluster = faulty()
    cluster.reconcile()
    del cluster.pods[cluster.pod(1).uid]
    cluster.statefulset_controller()
    young = cluster.pod(1).uid
    cluster.reconcile()
    cluster.settle()
    assert cluster.pod(1).uid == young
    assert cluster.gang_status().attempt == 2


def test_after_a_restart_the_gang_serves_again_with_new_pods():
    cluster = faulty()
    before = uids(cluster)
    cluster.settle()
    assert not before & uids(cluster)
    assert cluster.gang_status().phase == "Serving"
    assert cluster.gang_status().restarts_total == 1
    last = cluster.gang_status().last_restart
    assert last is not None
    assert (last.cause, last.exit_code, last.attempt) == ("RestartRequested", 75, 2)


def test_the_attempt_goes_above_that_of_the_config_map_if_status_was_lost():
    cluster = faulty()
    cluster.attempts[cluster.gang_status().name] = 7
    decision = cluster.decide()
    assert WriteAttempt(gang=cluster.gang_status().name, attempt=8) in decision.actions


@pytest.mark.parametrize("done", range(4))
def test_an_operator_that_dies_after_any_action_finishes_with_one_attempt(done: int):
    cluster = faulty()
    decision = cluster.decide()
    cluster.status = decision.status
    for action in decision.actions[:done]:
        cluster.carry_out(action)
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().restarts_total) == (2, 1)
    assert cluster.attempts[cluster.gang_status().name] == 2
    assert cluster.gang_status().ready


def test_a_status_that_could_not_be_written_leaves_nothing_done():
    cluster = faulty()
    assert cluster.decide() == cluster.decide()
    cluster.settle()
    assert cluster.gang_status().attempt == 2


def test_an_attempt_that_was_not_written_is_written_even_if_all_doomed_pods_are_gone():
    cluster = faulty()
    cluster.status = cluster.decide().status
    cluster.pods.clear()
    decision = cluster.reconcile()
    assert WriteAttempt(gang=cluster.gang_status().name, attempt=2) in decision.actions


def test_faults_of_doomed_pods_are_part_of_the_restart():
    cluster = faulty()
    cluster.reconcile()
    cluster.end_container(cluster.pod(0), 1)
    cluster.reconcile()
    cluster.end_pods()
    cluster.reconcile()
    cluster.settle()
    assert cluster.gang_status().attempt == 2


def test_a_pod_made_early_that_ends_as_its_doomed_peers_go_is_part_of_the_restart():
    cluster = faulty()
    cluster.reconcile()
    del cluster.pods[cluster.pod(0).uid]
    cluster.statefulset_controller()
    cluster.change(cluster.pod(0), running=True)
    cluster.end_container(cluster.pod(0), 75, "rank 1 was lost")
    cluster.end_pods()
    cluster.statefulset_controller()
    cluster.change(cluster.pod(1), running=True)
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().restarts_total) == (2, 1)


def test_64_of_a_new_pod_fails_the_gang_though_doomed_ones_are_left():
    cluster = faulty()
    cluster.reconcile()
    del cluster.pods[cluster.pod(1).uid]
    cluster.statefulset_controller()
    cluster.end_container(cluster.pod(1), 64, "no such option")
    cluster.reconcile()
    assert cluster.gang_status().phase == "Failed"


def test_restarts_in_a_row_wait_longer_and_longer():
    recovery = Recovery(backoff_base=30, backoff_limit=600)
    waits = [restarts.backoff(recovery, count) for count in range(8)]
    assert waits == [0, 30, 60, 120, 240, 480, 600, 600]


def test_a_second_restart_waits_with_its_pods_untouched():
    cluster = faulty()
    cluster.settle()
    cluster.end_container(cluster.pod(0), 1)
    kept = uids(cluster)
    decision = cluster.reconcile()
    assert decision.requeue_after == 30
    assert (under_way(cluster).attempt, cluster.gang_status().attempt) == (3, 2)
    cluster.wait(29)
    cluster.reconcile()
    assert uids(cluster) == kept
    assert not any(pod.deleting_since for pod in cluster.pods.values())
    cluster.wait(1)
    cluster.reconcile()
    assert all(pod.deleting_since for pod in cluster.pods.values())
    assert cluster.attempts[cluster.gang_status().name] == 3


def test_a_pod_made_during_the_backoff_is_doomed_too_since_it_read_the_old_attempt():
    cluster = faulty()
    cluster.settle()
    del cluster.pods[cluster.pod(0).uid]
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.wait(30)
    cluster.reconcile()
    assert set(under_way(cluster).doomed) == uids(cluster)


def test_more_faults_during_the_backoff_are_the_same_restart():
    cluster = faulty()
    cluster.settle()
    cluster.end_container(cluster.pod(0), 1)
    cluster.reconcile()
    cluster.restart_container(cluster.pod(0))
    cluster.end_container(cluster.pod(0), 1)
    cluster.reconcile()
    cluster.wait(30)
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().restarts_total) == (3, 2)


def test_the_backoff_begins_anew_after_the_stability_window():
    cluster = faulty(recovery={"stabilityWindow": 600})
    cluster.settle()
    assert cluster.gang_status().restarts == 1
    assert cluster.decide().requeue_after == 600
    cluster.wait(600)
    cluster.reconcile()
    assert cluster.gang_status().restarts == 0
    cluster.end_container(cluster.pod(0), 1)
    cluster.reconcile()
    assert under_way(cluster).not_before == ""
    assert cluster.gang_status().restarts_total == 2


def test_a_gang_that_is_not_ready_does_not_get_its_budget_back():
    cluster = faulty()
    cluster.reconcile()
    cluster.end_pods()
    cluster.statefulset_controller()
    cluster.start_pods(ready=False)
    cluster.wait(10_000)
    cluster.reconcile()
    assert cluster.gang_status().restarts == 1


def test_a_doomed_pod_on_a_dead_node_is_freed_after_the_toleration():
    cluster = serving(scheduling={"deadNodeToleration": 30})
    pod = cluster.pod(1)
    cluster.fail_node(pod.node)
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    cluster.wait(29)
    cluster.reconcile()
    assert pod.uid in cluster.pods
    cluster.wait(1)
    cluster.reconcile()
    assert DeletePod(name=pod.name, uid=pod.uid, grace_seconds=0) in cluster.deletions
    cluster.nodes[pod.node] = type(cluster.nodes[pod.node])(name=pod.node, ready=True)
    cluster.settle()
    assert cluster.gang_status().attempt == 2


def test_a_pod_on_a_dead_node_that_is_not_terminating_yet_gets_a_grace_period_first():
    cluster = serving(scheduling={"deadNodeToleration": 30})
    node = cluster.pod(0).node
    cluster.change(cluster.pod(1), node=node)
    cluster.fail_node(node)
    cluster.wait(60)
    cluster.delete_pod(cluster.pod(0).uid)
    cluster.reconcile()
    graces = {deletion.name: deletion.grace_seconds for deletion in cluster.deletions}
    assert graces == {f"{cluster.gang_status().name}-0": 0, f"{cluster.gang_status().name}-1": restarts.GRACE_SECONDS}
    cluster.reconcile()
    assert cluster.deletions[-1] == DeletePod(
        name=cluster.deletions[-1].name, uid=cluster.deletions[-1].uid, grace_seconds=0
    )


def test_no_pod_on_a_ready_node_is_deleted_without_grace():
    cluster = faulty()
    cluster.reconcile()
    cluster.wait(10_000)
    cluster.reconcile()
    assert all(deletion.grace_seconds > 0 for deletion in cluster.deletions)


def test_while_a_pod_will_not_end_its_node_is_looked_at_again_soon():
    cluster = faulty()
    cluster.reconcile()
    cluster.wait(restarts.GRACE_SECONDS + 100)
    assert cluster.decide().requeue_after == restarts.LOOK_AGAIN


def test_a_pod_whose_node_does_not_exist_is_left_to_kubernetes():
    cluster = faulty()
    cluster.reconcile()
    cluster.nodes.clear()
    cluster.wait(10_000)
    assert not any(isinstance(action, DeletePod) for action in cluster.decide().actions)


def test_the_other_gangs_are_left_alone():
    cluster = serving(replicas=3)
    cluster.end_container(cluster.pod(1, gang_index=1), 75)
    others = {pod.uid for pod in cluster.pods.values() if pod.gang != cluster.gang_status(1).name}
    cluster.settle()
    assert others <= uids(cluster)
    assert [gang.attempt for gang in cluster.status.gangs] == [1, 2, 1]
