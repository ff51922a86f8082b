"""Conditions, columns and the scale subresource, as kubectl, Helm and an autoscaler read them."""

from support.operator_cluster import Cluster, serving, spec_with


def times(cluster: Cluster) -> dict[str, str]:
    return {condition.type: condition.last_transition_time for condition in cluster.status.conditions}


def test_a_model_that_serves():
    cluster = serving(replicas=2)
    assert {kind: cluster.condition(kind) for kind in times(cluster)} == {
        "Accepted": ("True", "Accepted"),
        "Ready": ("True", "GangsReady"),
        "Progressing": ("False", "Complete"),
        "Degraded": ("False", "AsExpected"),
        "Stalled": ("False", "NotStalled"),
        "UpgradeAvailable": ("False", "UpToDate"),
    }


def test_a_model_whose_first_gangs_form_is_not_degraded():
    cluster = Cluster(spec=spec_with(replicas=2))
    cluster.reconcile()
    assert cluster.condition("Ready") == ("False", "NoGangReady")
    assert cluster.condition("Progressing") == ("True", "GangsStarting")
    assert cluster.condition("Degraded")[0] == "False"
    assert cluster.status.state == "Forming"


def test_reconciling_is_there_only_while_something_is_under_way():
    cluster = Cluster()
    cluster.reconcile()
    assert cluster.condition("Reconciling")[0] == "True"
    cluster.settle()
    assert "Reconciling" not in times(cluster)


def test_ready_needs_every_gang_that_is_wanted():
    cluster = serving(replicas=2)
    cluster.change(cluster.pod(0, gang_index=1), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    assert cluster.condition("Ready") == ("False", "GangsNotReady")
    assert cluster.condition("Degraded") == ("True", "GangNotReady")
    assert (cluster.status.ready, cluster.status.ready_replicas) == ("1/2", 1)


def test_a_restart_degrades():
    cluster = serving(replicas=2)
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    assert cluster.condition("Degraded") == ("True", "GangRestarting")
    assert cluster.status.state == "Restarting"


def test_a_rollout_progresses_until_its_last_gang_is_ready():
    cluster = serving(replicas=2)
    cluster.edit(drain_timeout=60)
    cluster.reconcile()
    assert cluster.condition("Progressing") == ("True", "RollingOut")
    assert cluster.status.state == "RollingOut"
    cluster.settle(40)
    assert cluster.condition("Progressing") == ("False", "Complete")


def test_scaling_progresses_until_the_pods_of_removed_gangs_are_gone():
    cluster = serving(replicas=2)
    cluster.edit(replicas=1)
    cluster.reconcile()
    assert cluster.condition("Progressing") == ("True", "Scaling")
    cluster.settle()
    assert cluster.condition("Progressing")[0] == "False"


def test_a_model_scaled_to_zero_is_as_ready_as_it_should_be():
    cluster = serving()
    cluster.edit(replicas=0)
    cluster.settle()
    assert cluster.condition("Ready") == ("True", "ScaledToZero")


def test_a_transition_time_moves_only_when_the_status_does():
    cluster = serving(replicas=2)
    before = times(cluster)
    cluster.wait(100)
    cluster.change(cluster.pod(0), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    after = times(cluster)
    moved = {kind for kind in before if before[kind] != after[kind]}
    assert moved == {"Ready", "Progressing", "Degraded"}


def test_a_message_may_change_without_a_transition():
    cluster = serving(replicas=3)
    cluster.change(cluster.pod(0, 0), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    before = times(cluster)
    cluster.wait(10)
    cluster.change(cluster.pod(0, 1), ready=False, ready_changed=cluster.now)
    cluster.reconcile()
    ready = next(condition for condition in cluster.status.conditions if condition.type == "Ready")
    assert ready.message == "1 of 3 gangs are ready"
    assert times(cluster)["Ready"] == before["Ready"]


def test_every_condition_and_the_status_say_which_generation_they_are_of():
    cluster = serving()
    cluster.edit(disruption_budget=2)
    cluster.reconcile()
    assert cluster.status.observed_generation == cluster.generation
    assert {condition.observed_generation for condition in cluster.status.conditions} == {cluster.generation}


def test_the_selector_matches_leader_pods_only():
    assert serving().status.selector == "tpmodel.dev/model=m,apps.kubernetes.io/pod-index=0"


def test_replicas_count_gangs_and_not_those_that_leave():
    cluster = serving(replicas=3)
    cluster.edit(replicas=2)
    cluster.reconcile()
    assert (cluster.status.replicas, cluster.status.ready_replicas, cluster.status.updated_replicas) == (2, 2, 2)
    assert len(cluster.status.gangs) == 3


def test_the_url_is_what_grpc_clients_dial():
    assert serving().status.url == "dns:///m-leaders.space.svc:9000"


def test_restarts_add_up_over_gangs():
    cluster = serving(replicas=2)
    for index in (0, 1):
        cluster.end_container(cluster.pod(1, index), 75)
    cluster.settle()
    assert cluster.status.restarts == 2
