"""A hub's branch is one commit for a whole rollout: the first that a pod found, whatever the branch is later."""

from support.operator_cluster import Cluster, serving, spec_with
from tpmodel_operator.actions import EnsureGang, WriteAttempt
from tpmodel_operator.api import TPModelStatus
from tpmodel_operator.observed import GangReport

A, B = "a" * 40, "b" * 40


def report(cluster: Cluster, index: int, commit: str) -> None:
    """The leader pod of a gang says which commit it has."""
    gang = cluster.gang_status(index).name
    cluster.reports[gang] = GangReport(
        gang=gang, phase="Loading", epoch=0, ready_ranks=0, load_percent=0, time=cluster.now, model_revision=commit
    )


def commits(cluster: Cluster) -> list[str]:
    return [entry.model_revision for entry in cluster.status.gangs]


def test_the_first_answer_is_recorded_and_every_gang_is_told():
    cluster = serving(replicas=2)
    report(cluster, 1, A)
    decision = cluster.reconcile()
    assert cluster.status.model_revision == A
    assert commits(cluster) == [A, A]
    told = [action for action in decision.actions if isinstance(action, WriteAttempt)]
    assert {action.gang: action.model_revision for action in told} == {entry.name: A for entry in cluster.status.gangs}
    assert not [action for action in cluster.reconcile().actions if isinstance(action, WriteAttempt)]


def test_nothing_is_recorded_before_a_pod_has_found_it_nor_of_an_answer_that_is_no_commit():
    cluster = serving()
    report(cluster, 0, "main")
    cluster.reconcile()
    assert (cluster.status.model_revision, commits(cluster)) == ("", [""])


def test_a_branch_that_moves_on_does_not_move_the_rollout():
    cluster = serving()
    report(cluster, 0, A)
    cluster.reconcile()
    report(cluster, 0, B)
    cluster.reconcile()
    assert (cluster.status.model_revision, commits(cluster)) == (A, [A])
    assert set(cluster.commits.values()) == {A}


def test_of_two_answers_one_is_recorded_for_all():
    cluster = serving(replicas=2)
    report(cluster, 0, A)
    report(cluster, 1, B)
    cluster.settle()
    assert commits(cluster) == [A, A]
    assert set(cluster.commits.values()) == {A}
    assert cluster.status.restarts == 0, "an answer restarts nothing: the pod reads its file and ends by itself"


def test_a_gang_that_comes_later_is_made_with_it():
    cluster = serving()
    report(cluster, 0, A)
    cluster.reconcile()
    cluster.edit(replicas=2)
    made = [action for action in cluster.reconcile().actions if isinstance(action, EnsureGang)]
    assert [action.model_revision for action in made] == [A]


def test_a_restart_keeps_it_even_if_the_config_map_is_lost():
    cluster = serving()
    report(cluster, 0, A)
    cluster.settle()
    cluster.commits.clear()
    cluster.attempts.clear()
    cluster.reports.clear()
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    assert cluster.gang_status().attempt == 2
    assert set(cluster.commits.values()) == {A}


def test_a_status_that_was_lost_is_found_again_in_the_config_map():
    cluster = serving()
    report(cluster, 0, A)
    cluster.settle()
    cluster.status = TPModelStatus()
    cluster.reports.clear()
    cluster.settle()
    assert (cluster.status.model_revision, commits(cluster)) == (A, [A])


def test_a_new_rollout_asks_anew_and_the_old_gangs_keep_theirs():
    cluster = serving(replicas=2)
    report(cluster, 0, A)
    cluster.settle()
    cluster.reports.clear()
    cluster.edit(drain_timeout=60)
    cluster.reconcile()
    assert cluster.status.model_revision == ""
    assert A in commits(cluster)
    cluster.settle()
    report(cluster, 0, B)
    cluster.settle()
    assert (cluster.status.model_revision, commits(cluster)) == (B, [B, B])


def test_setting_the_spec_back_is_back_at_the_former_commit():
    cluster = serving(replicas=2)
    report(cluster, 0, A)
    cluster.settle()
    cluster.edit(drain_timeout=60)
    cluster.reconcile()
    cluster.edit(drain_timeout=120)
    cluster.settle()
    assert (cluster.status.model_revision, commits(cluster)) == (A, [A, A])


def test_a_model_that_is_stopped_and_started_again_is_the_same_commit():
    cluster = serving()
    report(cluster, 0, A)
    cluster.settle()
    cluster.reports.clear()
    cluster.edit(replicas=0)
    cluster.settle()
    cluster.edit(replicas=1)
    cluster.settle()
    assert commits(cluster) == [A]


def test_while_the_spec_is_not_accepted_it_stays():
    cluster = serving()
    report(cluster, 0, A)
    cluster.settle()
    cluster.spec = spec_with(model={"uri": "file:///not/allowed"})
    cluster.generation += 1
    cluster.reconcile()
    assert cluster.status.model_revision == A
