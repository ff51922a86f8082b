"""W26: a user's request for new worlds, by an annotation: each value reaches each gang once, whatever happens."""

from support.operator_cluster import Cluster, serving, spec_with
from tpmodel_operator.actions import WriteAttempt
from tpmodel_operator.api import TPModelStatus
from tpmodel_operator.names import REBUILD_ANNOTATION


def in_place(**changes: object) -> Cluster:
    return serving(recovery={"mode": "InPlace"}, **changes)


def ask(cluster: Cluster, value: str) -> None:
    cluster.annotations = {REBUILD_ANNOTATION: value}


def counters(cluster: Cluster) -> list[int]:
    """What the gangs' ConfigMaps say."""
    return [cluster.rebuilds.get(gang.name, 0) for gang in cluster.status.gangs]


def test_a_new_value_raises_every_gangs_counter_by_one_and_is_told():
    cluster = in_place(replicas=2)
    ask(cluster, "a")
    cluster.reconcile()
    assert counters(cluster) == [1, 1]
    assert cluster.status.rebuild_requested == "a"
    assert "RebuildRequested" in cluster.reasons()


def test_the_same_value_asks_once_and_another_one_again():
    cluster = in_place()
    for value, expected in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        ask(cluster, value)
        cluster.settle()
        assert counters(cluster) == [expected]
    assert cluster.reasons().count("RebuildRequested") == 3


def test_an_annotation_taken_away_asks_for_nothing_and_the_same_value_again_neither():
    cluster = in_place()
    ask(cluster, "a")
    cluster.settle()
    cluster.annotations = {}
    cluster.settle()
    ask(cluster, "a")
    cluster.settle()
    assert counters(cluster) == [1]


def test_an_operator_that_dies_after_the_status_leaves_a_config_map_that_the_next_one_brings_up():
    cluster = in_place()
    ask(cluster, "a")
    cluster.status = cluster.decide().status
    assert counters(cluster) == [0]
    decision = cluster.reconcile()
    assert WriteAttempt(gang=cluster.gang_status().name, attempt=1, rebuild=1) in decision.actions
    cluster.settle()
    assert counters(cluster) == [1]


def test_a_value_that_stands_there_at_the_first_pass_is_old():
    cluster = Cluster(spec=spec_with(recovery={"mode": "InPlace"}))
    ask(cluster, "a")
    cluster.settle()
    assert (counters(cluster), cluster.status.rebuild_requested) == ([0], "a")


def test_a_status_that_was_lost_lowers_no_counter():
    cluster = in_place()
    ask(cluster, "a")
    cluster.settle()
    cluster.status = TPModelStatus()
    cluster.settle()
    ask(cluster, "b")
    cluster.settle()
    assert counters(cluster) == [2]


def test_gangs_that_are_made_later_are_not_asked():
    cluster = in_place()
    ask(cluster, "a")
    cluster.settle()
    cluster.edit(replicas=2)
    cluster.settle()
    assert counters(cluster) == [1, 0]


def test_a_request_costs_no_attempt_and_deletes_no_pod():
    cluster = in_place()
    before = dict(cluster.pods)
    ask(cluster, "a")
    cluster.settle()
    assert (cluster.pods, cluster.gang_status().attempt) == (before, 1)


def test_mode_restart_refuses_it_once_with_the_remedy():
    cluster = serving()
    ask(cluster, "a")
    cluster.settle()
    assert counters(cluster) == [0]
    assert cluster.reasons().count("RebuildRefused") == 1
    assert "write mode: InPlace" in next(event.message for event in cluster.events if event.reason == "RebuildRefused")


def test_a_value_of_any_length_is_asked_once():
    cluster = in_place()
    ask(cluster, "x" * 5000)
    cluster.settle()
    cluster.settle()
    assert counters(cluster) == [1]
