"""What an operator finds that was away, or whose memory is gone: it must come to what it would have done."""

from dataclasses import replace

from support.operator_cluster import Cluster, serving
from tpmodel_operator.actions import DeleteGang, DeletePod
from tpmodel_operator.api import TPModelStatus


def touched(cluster: Cluster) -> bool:
    """Whether the next pass deletes anything."""
    return any(isinstance(action, DeletePod | DeleteGang) for action in cluster.decide().actions)


def test_a_status_that_was_lost_is_made_again_from_what_exists():
    cluster = serving(replicas=2)
    cluster.attempts[cluster.gang_status(1).name] = 5
    cluster.status = TPModelStatus()
    assert not touched(cluster)
    cluster.settle()
    assert [gang.attempt for gang in cluster.status.gangs] == [1, 5]
    assert (cluster.status.state, cluster.status.ready) == ("Ready", "2/2")


def test_a_gang_without_status_whose_pods_serve_is_guarded_at_once():
    cluster = serving()
    cluster.status = TPModelStatus()
    cluster.reconcile()
    del cluster.pods[cluster.pod(1).uid]
    cluster.reconcile()
    assert cluster.gang_status().restarts_total == 1


def test_an_end_that_happened_while_the_operator_was_away_is_answered():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.restart_container(cluster.pod(0))
    cluster.wait(3600)
    cluster.start_pods()
    cluster.reconcile()
    assert cluster.gang_status().attempt == 2


def test_an_end_that_was_answered_is_not_answered_again():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75, "stale attempt: 1")
    cluster.restart_container(cluster.pod(0))
    cluster.settle()
    for _ in range(3):
        cluster.wait(1000)
        cluster.settle()
    assert cluster.gang_status().attempt == 1


def test_a_statefulset_that_somebody_deletes_is_made_again_when_its_pods_are_gone():
    cluster = serving()
    name = cluster.gang_status().name
    first = cluster.statefulsets.pop(name)
    for pod in list(cluster.pods.values()):
        cluster.delete_pod(pod.uid)
    cluster.reconcile()
    assert name not in cluster.statefulsets
    assert cluster.gang_status().phase == "Draining"
    cluster.settle()
    assert cluster.statefulsets[name].uid != first.uid
    assert cluster.status.state == "Ready"
    assert cluster.gang_status().restarts_total == 0


def test_a_statefulset_made_again_under_its_name_has_nothing_of_its_predecessor_but_the_attempt():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    name = cluster.gang_status().name
    cluster.statefulsets[name] = replace(cluster.statefulsets[name], uid="another")
    cluster.pods.clear()
    cluster.statefulset_controller()
    assert not touched(cluster)
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().restarts_total) == (2, 0)


def test_a_statefulset_that_the_watch_does_not_show_yet_is_not_made_under_another_name():
    cluster = serving()
    cluster.edit(replicas=2)
    cluster.reconcile()
    hidden = cluster.statefulsets.pop(cluster.gang_status(1).name)
    cluster.reconcile()
    assert len(cluster.status.gangs) == 2
    cluster.statefulsets[hidden.name] = hidden
    cluster.settle()
    assert len(cluster.statefulsets) == 2


def test_pods_that_are_seen_before_their_statefulset_are_not_taken_for_leftovers():
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    hidden = dict(cluster.statefulsets)
    cluster.statefulsets.clear()
    cluster.reconcile()
    assert cluster.gang_status().phase == "Pending"
    cluster.statefulsets = hidden
    cluster.settle()
    assert cluster.gang_status().attempt == 1


def test_a_gang_that_the_watch_does_not_show_yet_counts_when_the_model_is_scaled():
    cluster = serving(replicas=3)
    cluster.edit(replicas=4)
    cluster.reconcile()
    hidden = cluster.statefulsets.pop(cluster.gang_status(3).name)
    gone = cluster.gang_status(0).name
    del cluster.statefulsets[gone]
    cluster.pods = {uid: pod for uid, pod in cluster.pods.items() if pod.gang != gone}
    cluster.edit(replicas=3)
    cluster.reconcile()
    cluster.statefulsets[hidden.name] = hidden
    cluster.settle()
    assert [gang.index for gang in cluster.status.gangs] == [1, 2, 3]
    assert "GangDraining" not in cluster.reasons()


def test_pods_left_of_a_gang_that_nobody_remembers_keep_its_room_and_no_statefulset_is_deleted_for_them():
    cluster = serving()
    del cluster.statefulsets[cluster.gang_status().name]
    cluster.status = TPModelStatus()
    for _ in range(3):
        assert not touched(cluster)
        cluster.reconcile()
        assert cluster.statefulsets == {}
        assert cluster.gang_status().phase == "Draining"


def test_a_statefulset_seen_late_by_an_operator_without_memory_is_taken_up_again():
    cluster = serving()
    hidden = dict(cluster.statefulsets)
    cluster.statefulsets.clear()
    cluster.status = TPModelStatus()
    cluster.reconcile()
    cluster.statefulsets = hidden
    cluster.settle()
    assert (cluster.gang_status().phase, cluster.gang_status().attempt) == ("Serving", 1)
    assert set(cluster.statefulsets) == set(hidden)


def test_a_pod_with_a_foreign_gang_label_is_ignored():
    cluster = serving()
    stray = replace(cluster.pod(0), uid="stray", gang="not-a-gang-of-it")
    cluster.pods["stray"] = stray
    before = cluster.status
    cluster.reconcile()
    assert cluster.status == before


def test_a_restart_goes_on_if_the_spec_is_set_back_before_its_gang_was_removed():
    cluster = serving()
    cluster.end_container(cluster.pod(0), 75)
    cluster.reconcile()
    cluster.edit(replicas=0)
    cluster.status = cluster.decide().status
    cluster.edit(replicas=1)
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().restarts_total) == (2, 1)


def test_a_pod_lost_while_a_removal_was_decided_but_not_done_is_a_fault_if_the_gang_stays():
    cluster = serving()
    cluster.edit(replicas=0)
    cluster.status = cluster.decide().status
    del cluster.pods[cluster.pod(1).uid]
    cluster.status = cluster.decide().status
    cluster.edit(replicas=1)
    cluster.settle()
    assert cluster.gang_status().attempt == 2
