"""Events: one for each transition, none for a pass that changed nothing."""

from support.operator_cluster import Cluster, serving


def news(cluster: Cluster) -> list[str]:
    """Reasons of the events of the next pass."""
    return [event.reason for event in cluster.reconcile().events]


def test_a_new_model_tells_of_its_gang_and_then_that_it_is_ready():
    cluster = serving(replicas=2)
    assert cluster.reasons() == ["GangCreated", "GangCreated", "Ready", "GangReady", "GangReady"]


def test_nothing_is_told_twice():
    cluster = serving(replicas=2)
    cluster.end_container(cluster.pod(0), 75)
    assert news(cluster)
    assert news(cluster) == []


def test_a_restart_is_told_with_cause_attempt_and_the_pods_own_words():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75, "rank 1 hangs")
    (event,) = [event for event in cluster.reconcile().events if event.reason == "GangRestart"]
    assert event.type == "Warning"
    assert "attempt 2" in event.message
    assert "RestartRequested" in event.message
    assert "rank 1 hangs" in event.message


def test_a_restart_that_waits_says_until_when():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    cluster.end_container(cluster.pod(0), 75)
    (event,) = [event for event in cluster.reconcile().events if event.reason == "GangRestart"]
    assert "not before 2026-01-01T00:00:30Z" in event.message
    cluster.wait(30)
    assert "GangRestart" not in news(cluster)


def test_a_failed_gang_and_a_stalled_model_are_warnings():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 64, "no such option")
    told = {event.reason: event for event in cluster.reconcile().events}
    assert set(told) == {"NotReady", "Stalled", "GangFailed", "GangNotReady"}
    assert {event.type for event in told.values()} == {"Warning"}
    assert "no such option" in told["GangFailed"].message


def test_a_rollout_tells_its_revisions_and_its_gangs():
    cluster = serving()
    before = cluster.status.revision
    cluster.edit(drain_timeout=60)
    (event,) = [event for event in cluster.reconcile().events if event.reason == "RolloutStarted"]
    assert before in event.message
    assert cluster.status.revision in event.message
    cluster.settle()
    assert {"GangDraining", "GangRemoved", "GangCreated", "GangReady"} <= set(cluster.reasons())


def test_a_single_gang_without_disruption_budget_is_warned_of_once_per_spec():
    cluster = serving()
    assert cluster.reasons().count("NoDisruptionBudget") == 1
    cluster.edit(drain_timeout=60)
    cluster.settle()
    assert cluster.reasons().count("NoDisruptionBudget") == 2


def test_a_model_of_several_gangs_is_not_warned():
    assert "NoDisruptionBudget" not in serving(replicas=2).reasons()
