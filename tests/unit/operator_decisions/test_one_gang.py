from support.operator_cluster import Cluster, serving, spec_with
from tpmodel_operator import names
from tpmodel_operator.actions import DeleteGang, DeletePod, EnsureGang, EnsureModelChildren


def test_a_new_model_gets_its_children_and_then_its_gang():
    cluster = Cluster()
    decision = cluster.decide()
    children, made = decision.actions
    assert isinstance(children, EnsureModelChildren)
    assert isinstance(made, EnsureGang)
    assert made.name == names.gang_name("m", 0, decision.status.revision)
    assert (made.index, made.attempt, made.image) == (0, 1, cluster.settings.default_image)


def test_a_gang_is_in_status_before_it_is_made():
    decision = Cluster().decide()
    (gang,) = decision.status.gangs
    assert (gang.phase, gang.attempt, gang.revision) == ("Pending", 1, decision.status.revision)


def test_an_operator_that_dies_after_writing_status_makes_the_same_gang_in_its_next_pass():
    cluster = Cluster()
    first = cluster.decide()
    cluster.status = first.status
    assert cluster.decide().actions == first.actions


def test_a_gang_is_ready_when_its_leader_pod_is():
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.start_pods(ready=False)
    cluster.reconcile()
    assert cluster.gang_status().phase == "Loading"
    cluster.change(cluster.pod(0), ready=True, ready_changed=cluster.now)
    cluster.reconcile()
    assert cluster.gang_status().phase == "Serving"
    assert cluster.condition("Ready") == ("True", "GangsReady")
    assert (cluster.status.ready, cluster.status.state) == ("1/1", "Ready")


def test_a_pass_in_which_nothing_happened_changes_nothing():
    cluster = serving(replicas=3)
    before = cluster.status
    decision = cluster.reconcile()
    assert cluster.status == before
    assert [type(action) for action in decision.actions] == [EnsureModelChildren]
    assert decision.events == ()
    assert decision.requeue_after is None


def test_a_model_that_is_being_deleted_is_left_to_its_owner_references():
    cluster = serving()
    cluster.deleting = True
    decision = cluster.decide()
    assert decision.actions == ()
    assert decision.status == cluster.status


def test_scaling_to_zero_removes_the_gang_and_then_forgets_it():
    cluster = serving()
    uid = cluster.statefulsets[cluster.gang_status().name].uid
    cluster.edit(replicas=0)
    decision = cluster.reconcile()
    assert DeleteGang(name=cluster.gang_status().name, uid=uid) in decision.actions
    assert cluster.gang_status().phase == "Draining"
    cluster.settle()
    assert cluster.status.gangs == []
    assert cluster.pods == {}
    assert cluster.status.state == "ScaledToZero"


def test_pods_that_end_with_their_gang_are_no_fault():
    cluster = serving()
    cluster.edit(replicas=0)
    cluster.reconcile()
    cluster.end_pods()
    decision = cluster.reconcile()
    assert not any(isinstance(action, DeletePod) for action in decision.actions)


def test_all_gangs_of_a_new_model_are_made_at_once():
    cluster = Cluster(spec=spec_with(replicas=5))
    cluster.reconcile()
    assert len(cluster.statefulsets) == 5
