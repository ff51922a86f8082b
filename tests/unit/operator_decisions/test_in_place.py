"""Who restarts what, mode InPlace: most is left to supervisors, kubelets and the StatefulSet, and costs nothing."""

import pytest

from support.operator_cluster import Cluster, serving
from tpmodel_operator import clock
from tpmodel_operator.actions import DeletePod, WriteAttempt
from tpmodel_operator.observed import PodRecord


def in_place(**recovery: object) -> Cluster:
    """A gang of two pods that has served for a while."""
    cluster = serving(recovery={"mode": "InPlace"} | recovery, scheduling={"deadNodeToleration": 30})
    cluster.wait(3600)
    return cluster


def not_ready(cluster: Cluster) -> None:
    """The leader pod's readiness probe fails."""
    cluster.change(cluster.pod(0), ready=False, ready_changed=cluster.now)


def lose(cluster: Cluster, index: int) -> PodRecord:
    """A pod is gone, and no controller has made it again yet."""
    pod = cluster.pod(index)
    del cluster.pods[pod.uid]
    return pod


def nothing_done(cluster: Cluster) -> bool:
    """No pass deletes a pod or spends an attempt."""
    decision = cluster.reconcile()
    gang = cluster.gang_status()
    quiet = not any(isinstance(action, DeletePod | WriteAttempt) for action in decision.actions)
    return quiet and (gang.attempt, gang.restarts, gang.restarts_total, gang.restart) == (1, 0, 0, None)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("exit_code", [0, 1, 137])
def test_a_container_that_ends_is_left_to_its_kubelet(exit_code: int, index: int):
    cluster = in_place()
    cluster.end_container(cluster.pod(index), exit_code, "out of memory")
    assert nothing_done(cluster)
    cluster.restart_container(cluster.pod(index))
    assert nothing_done(cluster)
    cluster.start_pods()
    cluster.settle()
    assert cluster.gang_status().phase == "Serving"


def test_such_an_end_is_recorded_and_no_fault_when_the_mode_changes_to_restart():
    cluster = in_place()
    pod = cluster.pod(1)
    cluster.end_container(pod, 1)
    cluster.reconcile()
    cluster.restart_container(pod)
    cluster.start_pods()
    cluster.reconcile()
    assert [(end.uid, end.restart_count) for end in cluster.gang_status().handled] == [(pod.uid, 1)]
    cluster.edit(recovery=cluster.spec.recovery.model_copy(update={"mode": "Restart"}))
    cluster.reconcile()
    assert cluster.status.restarts == 0


def test_a_container_that_ends_with_75_restarts_the_gang():
    cluster = in_place()
    cluster.end_container(cluster.pod(1), 75, "11 rebuilds: the budget is spent")
    cluster.reconcile()
    gang = cluster.gang_status()
    assert gang.last_restart is not None
    assert (gang.attempt, gang.last_restart.cause) == (2, "RestartRequested")
    assert "the budget is spent" in gang.last_restart.message
    cluster.settle()
    assert cluster.gang_status().phase == "Serving"


def test_an_end_with_75_after_others_that_were_left_alone_counts():
    cluster = in_place()
    pod = cluster.pod(1)
    for exit_code in (137, 1):
        cluster.end_container(pod, exit_code)
        assert nothing_done(cluster)
        cluster.restart_container(pod)
        assert nothing_done(cluster)
    cluster.end_container(pod, 75)
    cluster.reconcile()
    assert cluster.gang_status().attempt == 2


def test_a_container_that_ends_with_64_fails_the_gang_at_once():
    cluster = in_place()
    cluster.end_container(cluster.pod(1), 64, "no such model")
    cluster.reconcile()
    gang = cluster.gang_status()
    assert gang.failure is not None
    assert (gang.failure.reason, gang.attempt) == ("ConfigurationRefused", 1)


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_that_is_gone_is_made_again_under_the_same_attempt_and_the_other_stays(index: int):
    cluster = in_place()
    lost, kept = lose(cluster, index), cluster.pod(1 - index)
    not_ready(cluster) if index else None
    assert nothing_done(cluster)
    assert cluster.gang_status().phase == "Rebuilding"
    cluster.statefulset_controller()
    assert nothing_done(cluster)
    cluster.start_pods()
    cluster.settle()
    assert cluster.gang_status().phase == "Serving"
    assert cluster.pod(index).uid != lost.uid
    assert cluster.pod(1 - index).uid == kept.uid
    assert cluster.deletions == []


def test_a_pod_that_is_deleted_drains_and_is_made_again():
    cluster = in_place()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    not_ready(cluster)
    assert nothing_done(cluster)
    assert cluster.gang_status().phase == "Draining"
    cluster.wait(100)
    cluster.end_container(cluster.pod(1), 0)
    assert nothing_done(cluster)
    cluster.settle()
    assert (cluster.gang_status().phase, cluster.gang_status().attempt) == ("Serving", 1)
    assert cluster.deletions == []


def test_a_leader_that_is_deleted_while_ready_was_ready_until_then():
    """Its condition says since when it had been Ready: that is no time of being not Ready."""
    cluster = in_place()
    leader = cluster.pod(0)
    cluster.change(leader, ready=True, ready_changed=cluster.now)
    cluster.reconcile()
    cluster.wait(3600)
    deleted = cluster.now
    cluster.delete_pod(leader.uid)
    assert nothing_done(cluster)
    assert cluster.gang_status().not_ready_since == clock.text(deleted)
    lose(cluster, 0)
    cluster.wait(5)
    assert nothing_done(cluster)


def test_an_evicted_pod_is_left_to_the_stateful_set():
    cluster = in_place()
    cluster.change(cluster.pod(1), phase="Failed", running=False, ready=False)
    assert nothing_done(cluster)


def test_a_leader_not_ready_past_the_deadline_and_a_minute_restarts_the_gang():
    cluster = in_place(deadline=100)
    not_ready(cluster)
    assert cluster.reconcile().requeue_after == 160
    cluster.wait(159)
    assert nothing_done(cluster)
    cluster.wait(1)
    cluster.reconcile()
    gang = cluster.gang_status()
    assert gang.last_restart is not None
    assert (gang.attempt, gang.last_restart.cause) == (2, "LeaderNotReady")


def test_while_a_lost_pod_waits_for_a_node_the_survivors_keep_their_weights():
    """The leader cannot be Ready without it."""
    cluster = in_place(deadline=100, formationDeadline=1800)
    lose(cluster, 1)
    not_ready(cluster)
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.wait(1700)
    assert nothing_done(cluster)


@pytest.mark.parametrize("index", [0, 1])
def test_a_pod_that_was_made_again_loads_as_long_as_it_takes(index: int):
    """As those of a new gang do: its supervisor judges its progress."""
    cluster = in_place(deadline=100)
    lose(cluster, index)
    cluster.statefulset_controller()
    cluster.wait(15)
    not_ready(cluster) if index else None
    cluster.reconcile()
    cluster.change(cluster.pod(index), running=True, phase="Running")
    for _ in range(5):
        assert nothing_done(cluster)
        cluster.wait(1000)
    cluster.settle()
    not_ready(cluster)
    cluster.reconcile()
    cluster.wait(160)
    cluster.reconcile()
    assert cluster.gang_status().attempt == 2, "once it has been Ready again the next outage has its deadline"


def test_a_pod_that_was_made_again_and_ends_while_it_loads_is_no_longer_waited_for():
    cluster = in_place(deadline=100)
    lose(cluster, 1)
    not_ready(cluster)
    cluster.statefulset_controller()
    cluster.reconcile()
    cluster.change(cluster.pod(1), running=True, phase="Running")
    cluster.wait(300)
    assert nothing_done(cluster)
    cluster.end_container(cluster.pod(1), 137, "out of memory")
    cluster.reconcile()
    gang = cluster.gang_status()
    assert gang.last_restart is not None
    assert (gang.attempt, gang.last_restart.cause) == (2, "LeaderNotReady")


def test_a_pod_that_is_not_made_again_within_the_formation_deadline_restarts_the_gang():
    cluster = in_place(formationDeadline=600)
    cluster.wait(5000)
    lose(cluster, 1)
    assert nothing_done(cluster)
    assert cluster.reconcile().requeue_after == 600
    cluster.wait(600)
    cluster.reconcile()
    gang = cluster.gang_status()
    assert gang.last_restart is not None
    assert gang.last_restart.cause == "FormationDeadline"


def test_a_second_loss_has_the_whole_deadline_again():
    cluster = in_place(formationDeadline=600)
    for _ in range(3):
        lose(cluster, 1)
        assert nothing_done(cluster)
        cluster.wait(500)
        assert nothing_done(cluster)
        cluster.settle()
        cluster.wait(500)
    assert cluster.gang_status().restarts_total == 0


def test_a_leader_pod_that_loads_again_is_not_hurried_while_the_gang_first_forms():
    cluster = Cluster()
    cluster.spec = in_place().spec
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.start_pods(ready=False)
    cluster.reconcile()
    cluster.wait(10_000)
    assert nothing_done(cluster)
    assert cluster.gang_status().phase == "Loading"


def test_a_pod_on_a_dead_node_is_freed_after_the_toleration_and_made_again_without_an_attempt():
    cluster = in_place()
    pod = cluster.pod(1)
    cluster.fail_node(pod.node)
    not_ready(cluster)
    cluster.delete_pod(pod.uid, 135)
    cluster.wait(10)
    decision = cluster.reconcile()
    assert decision.requeue_after == 20
    assert cluster.deletions == []
    cluster.wait(20)
    cluster.reconcile()
    assert cluster.deletions == [DeletePod(name=pod.name, uid=pod.uid, grace_seconds=0)]
    cluster.nodes["other"] = cluster.nodes[cluster.pod(0).node]
    cluster.statefulset_controller()
    cluster.change(cluster.pod(1), node="other")
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().phase) == (1, "Serving")


def test_a_lost_token_restarts_the_gang_once():
    cluster = in_place()
    cluster.tokens_missing.add(cluster.gang_status().name)
    cluster.settle()
    gang = cluster.gang_status()
    assert gang.last_restart is not None
    assert (gang.attempt, gang.last_restart.cause) == (2, "TokenLost")


def test_a_restart_forgets_what_was_missing_before_it():
    cluster = in_place()
    lose(cluster, 1)
    cluster.reconcile()
    assert cluster.gang_status().incomplete_since
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    assert cluster.gang_status().incomplete_since == ""
    cluster.settle()
    assert cluster.gang_status().attempt == 2


def test_a_pod_that_never_ends_though_its_grace_is_over_does_not_keep_the_leaders_deadline_away():
    """A kubelet that hangs on a node that is Ready."""
    cluster = in_place(deadline=100)
    cluster.delete_pod(cluster.pod(1).uid, 135)
    not_ready(cluster)
    cluster.wait(135)
    assert nothing_done(cluster)
    cluster.wait(25)
    cluster.reconcile()
    assert cluster.gang_status().attempt == 2
