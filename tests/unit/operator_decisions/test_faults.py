"""Who restarts what, mode Restart: each kind of fault of a gang that has formed."""

from dataclasses import replace

import pytest

from support.operator_cluster import Cluster, serving
from tpmodel_operator import gang
from tpmodel_operator.api import LastRestart
from tpmodel_operator.observed import GangReport


def cause(cluster: Cluster) -> str:
    """Of the restart that is decided by the next pass; empty: there is none."""
    cluster.reconcile()
    last = cluster.gang_status().last_restart
    return last.cause if last is not None else ""


def last_restart(cluster: Cluster) -> LastRestart:
    last = cluster.gang_status().last_restart
    assert last is not None
    return last


@pytest.mark.parametrize(
    ("exit_code", "expected"),
    [(75, "RestartRequested"), (1, "ContainerEnded"), (0, "ContainerEnded"), (137, "ContainerEnded")],
)
def test_a_container_that_ends_restarts_its_gang(exit_code: int, expected: str):
    cluster = serving()
    cluster.end_container(cluster.pod(1), exit_code, "rank 1 was killed by signal 9")
    assert cause(cluster) == expected
    assert last_restart(cluster).exit_code == exit_code
    assert "rank 1 was killed by signal 9" in last_restart(cluster).message


def test_an_end_counts_even_if_the_container_runs_again_when_it_is_seen():
    cluster = serving()
    cluster.end_container(cluster.pod(1), 75)
    cluster.restart_container(cluster.pod(1))
    assert cause(cluster) == "RestartRequested"


def test_an_end_for_a_stale_attempt_is_no_fault_and_costs_nothing():
    cluster = serving()
    cluster.end_container(cluster.pod(1), 75, "stale attempt: 1, the gang is at 2")
    assert cause(cluster) == ""
    cluster.restart_container(cluster.pod(1))
    assert cause(cluster) == ""
    assert cluster.gang_status().restarts == 0


def test_a_fault_after_a_stale_end_of_the_same_container_counts():
    cluster = serving()
    cluster.end_container(cluster.pod(1), 75, "stale attempt: 1, the gang is at 2")
    cluster.reconcile()
    cluster.restart_container(cluster.pod(1))
    cluster.end_container(cluster.pod(1), 75, "rank 1 hangs")
    assert cause(cluster) == "RestartRequested"


def test_a_pod_that_is_gone_restarts_its_gang():
    cluster = serving()
    del cluster.pods[cluster.pod(1).uid]
    assert cause(cluster) == "PodLost"


def test_a_pod_replaced_under_its_name_while_nobody_looked_restarts_its_gang():
    cluster = serving()
    del cluster.pods[cluster.pod(1).uid]
    cluster.statefulset_controller()
    cluster.start_pods()
    assert cause(cluster) == "PodLost"


def test_a_terminating_pod_is_draining_not_lost():
    cluster = serving()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    cluster.wait(130)
    assert cause(cluster) == ""
    assert cluster.gang_status().phase == "Draining"


def test_a_terminating_pod_is_lost_when_its_container_has_ended():
    cluster = serving()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    cluster.end_container(cluster.pod(1), 0)
    assert cause(cluster) == "PodDeleted"


def test_a_terminating_pod_is_lost_when_its_object_is_gone():
    cluster = serving()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    cluster.reconcile()
    cluster.end_pods()
    assert cause(cluster) == "PodDeleted"


def test_a_terminating_pod_is_lost_when_its_grace_period_is_over():
    cluster = serving()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    assert cluster.reconcile().requeue_after == 135
    cluster.wait(135)
    assert cause(cluster) == "PodDeleted"


def test_containers_that_end_with_0_since_another_pod_drains_name_that_pod_as_the_cause():
    cluster = serving()
    cluster.delete_pod(cluster.pod(1).uid, 135)
    cluster.end_container(cluster.pod(0), 0)
    assert cause(cluster) == "PodDeleted"
    assert cluster.pod(1).name in last_restart(cluster).message


def test_a_leader_not_ready_while_a_pod_drains_is_no_fault():
    cluster = serving(drainTimeout=3600)
    cluster.delete_pod(cluster.pod(1).uid, 3615)
    cluster.change(cluster.pod(0), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    cluster.wait(3000)
    assert cause(cluster) == ""


def test_an_evicted_pod_restarts_its_gang_though_its_object_stays():
    cluster = serving()
    cluster.change(cluster.pod(1), phase="Failed", running=False, ready=False)
    assert cause(cluster) == "PodEnded"


def test_a_leader_not_ready_past_the_deadline_and_a_minute_restarts_the_gang():
    cluster = serving(recovery={"deadline": 100})
    cluster.change(cluster.pod(0), ready=False, ready_changed=cluster.now)
    assert cluster.reconcile().requeue_after == 160
    assert cluster.gang_status().phase == "Rebuilding"
    cluster.wait(159)
    assert cause(cluster) == ""
    cluster.wait(1)
    assert cause(cluster) == "LeaderNotReady"


def test_after_such_a_restart_loading_may_again_take_as_long_as_it_takes():
    cluster = serving(recovery={"deadline": 100})
    cluster.change(cluster.pod(0), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    cluster.wait(160)
    cluster.reconcile()
    cluster.end_pods()
    cluster.statefulset_controller()
    cluster.start_pods(ready=False)
    for _ in range(3):
        cluster.reconcile()
        cluster.wait(3600)
    assert cluster.gang_status().restarts_total == 1
    assert cluster.gang_status().phase == "Loading"


def test_a_leader_that_was_not_ready_for_a_moment_starts_its_deadline_anew():
    cluster = serving(recovery={"deadline": 100})
    leader = cluster.pod(0)
    for _ in range(5):
        cluster.change(leader, ready=False, ready_changed=cluster.now)
        cluster.reconcile()
        cluster.wait(150)
        cluster.change(leader, ready=True, ready_changed=cluster.now)
        cluster.reconcile()
        cluster.wait(10)
    assert cause(cluster) == ""


def test_a_worker_pod_that_is_not_ready_is_left_to_its_leader():
    cluster = serving()
    cluster.change(cluster.pod(1), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    cluster.wait(10_000)
    assert cause(cluster) == ""


def test_a_lost_token_restarts_the_gang_once():
    cluster = serving()
    cluster.tokens_missing.add(cluster.gang_status().name)
    assert cause(cluster) == "TokenLost"
    cluster.settle()
    assert cluster.gang_status().restarts_total == 1


def test_a_token_lost_before_any_container_started_needs_no_restart():
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.tokens_missing.add(cluster.gang_status().name)
    assert cause(cluster) == ""


def test_a_pod_on_a_dead_node_is_lost_once_the_toleration_is_over_though_it_never_ends():
    cluster = serving(scheduling={"deadNodeToleration": 30}, drainTimeout=600)
    node = cluster.pod(1).node
    cluster.fail_node(node)
    cluster.wait(30)
    cluster.delete_pod(cluster.pod(1).uid, 615)
    assert cause(cluster) == "NodeLost"


def test_a_pod_drained_off_a_node_that_is_not_ready_waits_for_the_toleration():
    cluster = serving(scheduling={"deadNodeToleration": 30}, drainTimeout=600)
    cluster.delete_pod(cluster.pod(1).uid, 615)
    cluster.fail_node(cluster.pod(1).node)
    cluster.wait(10)
    assert cluster.reconcile().requeue_after == 20
    assert cluster.gang_status().restarts_total == 0


def test_what_a_leader_reports_is_shown_and_restarts_nothing():
    cluster = serving()
    name = cluster.gang_status().name
    report = GangReport(gang=name, phase="failed", epoch=7, ready_ranks=0, load_percent=3, time=cluster.now)
    observed = replace(cluster.observed(), reports={name: report})
    decision = gang.decide(observed, cluster.settings)
    (shown,) = decision.status.gangs
    assert (shown.epoch, shown.ready_ranks, shown.load_percent) == (7, 0, 3)
    assert (shown.phase, shown.restart) == ("Serving", None)


def test_a_report_from_before_a_restart_is_not_shown_after_it():
    cluster = serving()
    report = GangReport(
        gang=cluster.gang_status().name, phase="serving", epoch=7, ready_ranks=2, load_percent=100, time=cluster.now
    )
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    decision = gang.decide(replace(cluster.observed(), reports={report.gang: report}), cluster.settings)
    (shown,) = decision.status.gangs
    assert (shown.epoch, shown.ready_ranks, shown.load_percent) == (0, 0, 0)


def test_several_faults_at_once_are_one_restart():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 1)
    del cluster.pods[cluster.pod(1).uid]
    cluster.tokens_missing.add(cluster.gang_status().name)
    cluster.reconcile()
    assert (cluster.gang_status().restarts_total, cluster.gang_status().attempt) == (1, 2)
