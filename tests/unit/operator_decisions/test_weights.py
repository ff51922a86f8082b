"""Which weights gangs have: in status, ConfigMaps and Events, over restarts, rollouts and resets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support.operator_cluster import Cluster, serving
from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang, WriteAttempt
from tpmodel_operator.api import TPModelStatus
from tpmodel_operator.observed import GangReport

LOST = ("WeightsLost", "version 3 is lost; send a full set")


def report(cluster: Cluster, index: int, version: int, condition: str = "", message: str = "", **fields: str) -> None:
    """The leader pod of a gang says what it has."""
    gang = cluster.gang_status(index).name
    cluster.reports[gang] = GangReport(
        gang=gang,
        phase=fields.get("phase", "Serving"),
        epoch=0,
        ready_ranks=2,
        load_percent=100,
        time=cluster.now,
        weights_version=version,
        weights_condition=condition,
        weights_message=message,
    )


def updated(version: int = 3, **spec: object) -> Cluster:
    """All gangs serve a version that a trainer has sent."""
    cluster = serving(**spec)
    cluster.wait(60)
    for gang in cluster.status.gangs:
        report(cluster, gang.index, version)
    cluster.settle()
    return cluster


def not_ready(cluster: Cluster, index: int = 0) -> None:
    """The leader pod's readiness probe fails."""
    cluster.change(cluster.pod(0, index), ready=False, ready_changed=cluster.now)


def committed(cluster: Cluster) -> list[int]:
    return [gang.weights_committed for gang in cluster.status.gangs]


# ------------------------------------------------------------------------------------------ what is served


def test_a_model_that_nobody_updates_is_at_version_0_and_has_no_condition_of_weights() -> None:
    cluster = updated(version=0, replicas=2)
    assert cluster.status.weights_version == 0
    assert "WeightsReady" not in [condition.type for condition in cluster.status.conditions]
    assert "WeightsCommitted" not in cluster.reasons()
    assert set(cluster.weights.values()) == {0}


def test_the_version_is_shown_of_each_gang_and_of_the_model_once_all_agree() -> None:
    cluster = updated(replicas=2)
    report(cluster, 0, 4)
    cluster.reconcile()
    assert [gang.weights_version for gang in cluster.status.gangs] == [4, 3]
    assert cluster.status.weights_version is None
    assert cluster.condition("WeightsReady") == ("False", "VersionsDiffer")
    report(cluster, 1, 4)
    cluster.reconcile()
    assert cluster.status.weights_version == 4
    assert cluster.condition("WeightsReady") == ("True", "VersionServed")


def test_a_gang_that_has_not_been_heard_yet_makes_no_version_of_the_model() -> None:
    assert serving().status.weights_version is None


def test_each_commit_is_told_once() -> None:
    cluster = updated(replicas=2)
    cluster.reconcile()
    assert cluster.reasons().count("WeightsCommitted") == 2


def test_a_commit_is_written_to_the_config_map_once_and_never_lowered() -> None:
    cluster = serving()
    report(cluster, 0, 3)
    written = [action for action in cluster.reconcile().actions if isinstance(action, WriteAttempt)]
    assert [action.weights_version for action in written] == [3]
    report(cluster, 0, 0)
    assert not [action for action in cluster.reconcile().actions if isinstance(action, WriteAttempt)]
    assert (committed(cluster), set(cluster.weights.values())) == ([3], {3})


def test_what_is_kept_on_a_volume_is_shown_and_told_once_where_that_fails() -> None:
    cluster = updated()
    gang = cluster.gang_status().name
    kept = replace(cluster.reports[gang], weights_kept=2, weights_keeping_error="rank 1: no space left")
    cluster.reports[gang] = kept
    cluster.reconcile()
    cluster.reconcile()
    assert (cluster.gang_status().weights_kept, cluster.gang_status().weights_version) == (2, 3)
    (event,) = [event for event in cluster.events if event.reason == "WeightsNotKept"]
    assert event.type == "Warning"
    assert event.message.endswith("rank 1: no space left")
    cluster.reports[gang] = replace(kept, weights_kept=3, weights_keeping_error="")
    cluster.reconcile()
    assert (cluster.gang_status().weights_kept, cluster.gang_status().weights_keeping_error) == (3, "")


# ------------------------------------------------------------------------------------ what is not served


@pytest.mark.parametrize("condition", ["WeightsIncomplete", "WeightsLost"])
def test_a_gang_without_whole_weights_is_a_condition_and_an_event_with_the_remedy(condition: str) -> None:
    cluster = updated(replicas=2)
    report(cluster, 1, 3, condition, "send a full set")
    cluster.reconcile()
    cluster.reconcile()
    gang = cluster.gang_status(1)
    assert (gang.weights_version, gang.weights_condition) == (None, condition)
    assert cluster.condition("WeightsReady") == ("False", condition)
    (event,) = [event for event in cluster.events if event.reason == condition]
    assert event.type == "Warning"
    assert names.RESET_WEIGHTS_ANNOTATION in event.message


def test_a_long_pause_is_shown_and_is_no_warning() -> None:
    cluster = updated()
    report(cluster, 0, 3, "WeightsUpdating", "a weight update is under way")
    cluster.reconcile()
    assert cluster.condition("WeightsReady") == ("False", "WeightsUpdating")
    assert cluster.gang_status().weights_version == 3
    assert "WeightsUpdating" not in cluster.reasons()


@pytest.mark.parametrize("mode", ["InPlace", "Restart"])
def test_a_gang_that_waits_for_weights_is_not_restarted_however_long(mode: str) -> None:
    """A restart would lose what is left of them, and spend the budget of restarts for nothing."""
    cluster = updated(recovery={"mode": mode})
    report(cluster, 0, 3, *LOST)
    not_ready(cluster)
    cluster.reconcile()
    cluster.wait(3600)
    cluster.reports.clear()  # an operator that has just started, and has asked nobody yet
    cluster.reconcile()
    assert (cluster.status.restarts, cluster.gang_status().weights_condition) == (0, "WeightsLost")


def test_once_its_weights_are_whole_it_has_its_deadline_anew() -> None:
    cluster = updated(recovery={"mode": "InPlace"})
    report(cluster, 0, 3, *LOST)
    not_ready(cluster)
    cluster.reconcile()
    cluster.wait(3600)
    report(cluster, 0, 3)
    cluster.reconcile()
    assert cluster.status.restarts == 0
    cluster.wait(181)
    cluster.reconcile()
    assert cluster.gang_status().last_restart is not None


def test_a_restart_forgets_the_condition_and_keeps_the_version() -> None:
    cluster = updated()
    report(cluster, 0, 3, *LOST)
    cluster.end_container(cluster.pod(1), 75)
    cluster.reconcile()
    assert cluster.gang_status().restart is not None
    assert (cluster.gang_status().weights_condition, committed(cluster)) == ("", [3])


def test_an_answer_of_the_attempt_before_says_nothing_of_the_new_pods() -> None:
    cluster = updated()
    report(cluster, 0, 3, *LOST)
    cluster.wait(1)
    cluster.end_container(cluster.pod(1), 75)
    cluster.settle()
    assert (cluster.gang_status().attempt, cluster.gang_status().weights_condition) == (2, "")


# -------------------------------------------------------------------------- gangs and pods that come later


def test_a_gang_that_comes_later_is_made_to_have_the_newest_version() -> None:
    cluster = updated()
    cluster.edit(replicas=2)
    made = [action for action in cluster.reconcile().actions if isinstance(action, EnsureGang)]
    assert [action.weights_version for action in made] == [3]


def test_a_gang_that_forms_while_another_commits_is_told_and_one_that_serves_is_not() -> None:
    cluster = updated(replicas=2)
    cluster.edit(replicas=3)
    cluster.reconcile()
    cluster.statefulset_controller()
    report(cluster, 0, 4)
    cluster.reconcile()
    assert committed(cluster) == [4, 3, 4]


def test_a_rollout_does_not_go_back_to_the_checkpoint() -> None:
    cluster = updated(replicas=2)
    cluster.reports.clear()
    cluster.edit(drain_timeout=60)
    cluster.settle()
    assert (committed(cluster), set(cluster.weights.values())) == ([3, 3], {3})


def test_a_model_that_is_stopped_and_started_again_is_to_have_the_same_version() -> None:
    cluster = updated()
    cluster.reports.clear()
    cluster.edit(replicas=0)
    cluster.settle()
    cluster.edit(replicas=1)
    cluster.settle()
    assert committed(cluster) == [3]


def test_a_status_that_was_lost_is_found_again_in_the_config_maps() -> None:
    cluster = updated()
    cluster.status = TPModelStatus()
    cluster.reports.clear()
    cluster.settle()
    assert (committed(cluster), cluster.status.weights_newest) == ([3], 3)


def test_while_the_spec_is_not_accepted_versions_are_still_noted() -> None:
    cluster = updated()
    cluster.edit(model=cluster.spec.model.model_copy(update={"uri": "file:///not/allowed"}))
    report(cluster, 0, 4)
    cluster.reconcile()
    assert set(cluster.weights.values()) == {4}
    assert cluster.condition("Accepted")[0] == "False"


# ---------------------------------------------------------------------------------- back to the checkpoint


def test_another_revision_of_the_model_begins_with_its_checkpoint() -> None:
    cluster = updated(replicas=2)
    cluster.reports.clear()
    cluster.edit(model=cluster.spec.model.model_copy(update={"revision": "v2"}))
    cluster.settle()
    assert (committed(cluster), cluster.status.weights_newest) == ([0, 0], 0)


def test_the_annotation_is_a_rollout_that_begins_with_the_checkpoint_once() -> None:
    cluster = updated(replicas=2)
    before = cluster.status.revision
    cluster.annotations[names.RESET_WEIGHTS_ANNOTATION] = "monday"
    cluster.reconcile()
    assert cluster.status.revision != before
    cluster.reports.clear()
    cluster.settle()
    assert (committed(cluster), cluster.status.weights_newest) == ([0, 0], 0)
    after = cluster.status.revision
    for gang in cluster.status.gangs:
        report(cluster, gang.index, 1)
    cluster.annotations.clear()
    cluster.settle()
    assert (cluster.status.revision, committed(cluster)) == (after, [1, 1])


def test_gangs_of_the_revision_before_do_not_take_their_version_into_the_new_one() -> None:
    cluster = updated(replicas=2)
    cluster.edit(model=cluster.spec.model.model_copy(update={"revision": "v2"}))
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.reconcile()
    new = [gang for gang in cluster.status.gangs if gang.revision == cluster.status.revision]
    assert [gang.weights_committed for gang in new] == [0] * len(new)
