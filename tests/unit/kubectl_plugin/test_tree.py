"""The status tree, over statuses that the operator's decisions made."""

from __future__ import annotations

from dataclasses import replace

import pytest

from support import operator_cluster
from support.operator_cluster import START, Cluster, serving
from support.plugin_objects import view
from tpmodel.kubectl.tree import render
from tpmodel_operator.observed import GangReport, ReportedFault, ReportedRebuild


def tree(cluster: Cluster) -> str:
    return "\n".join(render(view(cluster), cluster.now))


def line_with(text: str, part: str) -> str:
    (found,) = (line for line in text.splitlines() if part in line)
    return found


def test_model_conditions_gangs_and_pods_are_nested() -> None:
    lines = tree(operator_cluster.serving(replicas=2)).splitlines()
    depths = {
        what: len(line) - len(line.lstrip())
        for what in ("TPModel space/m", "conditions", "Ready ", "gang 1", "NODE", "m-1-")
        for line in lines
        if line.lstrip().startswith(what) or what == "NODE" in line
    }
    assert depths["TPModel space/m"] < depths["conditions"] < depths["Ready "]
    assert depths["TPModel space/m"] < depths["gang 1"] < depths["NODE"] == depths["m-1-"]


def test_a_serving_model_says_so_first() -> None:
    first = tree(operator_cluster.serving(replicas=2)).splitlines()[0]
    assert first == "TPModel space/m: Ready, 2/2 gangs ready"


def test_a_condition_has_status_age_reason_and_message() -> None:
    cluster = operator_cluster.serving()
    cluster.wait(300)
    assert line_with(tree(cluster), "GangsReady").split() == [
        *("Ready", "True", "5m", "GangsReady:", "1", "of", "1", "gangs", "are", "ready")
    ]


def test_a_gang_shows_revision_attempt_epoch_and_ranks() -> None:
    cluster = operator_cluster.serving()
    gang = cluster.gang_status()
    gang = gang.model_copy(update={"epoch": 4294967297, "ready_ranks": 1})
    cluster.status = cluster.status.model_copy(update={"gangs": [gang]})
    shown = line_with(tree(cluster), "    revision ")
    assert shown.strip() == f"revision {gang.revision}, attempt 1, epoch 4294967297, 1 of 2 ranks ready, 0 restarts"


def test_what_a_leader_has_not_reported_yet_is_not_shown_as_nought() -> None:
    assert line_with(tree(operator_cluster.serving()), "    revision ").endswith(
        ", attempt 1, ? of 2 ranks ready, 0 restarts"
    )


def test_a_loading_gang_shows_how_far_it_is() -> None:
    cluster = Cluster()
    cluster.reconcile()
    cluster.statefulset_controller()
    cluster.start_pods(ready=False)
    cluster.reconcile()
    report = GangReport(gang="", phase="Loading", epoch=1, ready_ranks=0, load_percent=42, time=START)
    gang = cluster.gang_status().model_copy(update={"load_percent": report.load_percent})
    cluster.status = cluster.status.model_copy(update={"gangs": [gang]})
    assert line_with(tree(cluster), "gang 0").endswith("Loading 42%")


def test_a_pod_shows_node_readiness_restarts_and_state() -> None:
    cluster = operator_cluster.serving()
    pod = cluster.pod(1)
    assert line_with(tree(cluster), pod.name).split() == [pod.name, "node-1", "yes", "0", "running"]


def restarted() -> Cluster:
    cluster = operator_cluster.serving()
    cluster.end_container(cluster.pod(1), 75, "rank 1 was killed by SIGKILL while the world was serving")
    cluster.reconcile()
    return cluster


def test_a_restart_is_shown_with_cause_exit_code_and_the_supervisors_words() -> None:
    cluster = restarted()
    cluster.wait(30)
    shown = line_with(tree(cluster), "last restart")
    assert "attempt 2, 30s ago" in shown
    assert "RestartRequested, exit code 75" in shown
    assert "rank 1 was killed by SIGKILL while the world was serving" in shown


def test_restarts_are_counted_and_set_beside_the_budget() -> None:
    cluster = restarted()
    assert tree(cluster).splitlines()[0].endswith(", 1 restart")
    assert line_with(tree(cluster), "    revision ").endswith("1 restart, 1 of 10 of its budget")


def test_a_restart_that_waits_out_its_backoff_says_how_long() -> None:
    cluster = restarted()
    cluster.settle()
    cluster.end_container(cluster.pod(0), 137)
    cluster.reconcile()
    cluster.wait(10)
    assert line_with(tree(cluster), "before this restart").strip() == "it waits 20s before this restart"


def test_a_failed_gang_says_why_and_since_when() -> None:
    cluster = operator_cluster.serving()
    cluster.end_container(cluster.pod(0), 64, "/model has no config.json")
    cluster.reconcile()
    cluster.wait(7200)
    shown = line_with(tree(cluster), "failed ")
    assert shown.strip().startswith("failed 2h ago, ConfigurationRefused: ConfigurationRefused, exit code 64: ")
    assert shown.endswith("/model has no config.json")


def test_a_gang_without_pods_says_what_the_cluster_says() -> None:
    cluster = Cluster()
    cluster.reconcile()
    model = view(cluster)
    refused = replace(model.gangs[0], warning="FailedCreate: violates PodSecurity")
    text = "\n".join(render(replace(model, gangs=(refused,)), cluster.now))
    assert line_with(text, "no pods").strip() == "no pods; FailedCreate: violates PodSecurity"


def test_without_any_status_the_operator_is_asked_for() -> None:
    text = tree(Cluster())
    assert "TPModel space/m: unknown, 0/1 gangs ready" in text
    assert "no operator has looked at it yet" in text


def test_a_status_of_an_older_spec_is_marked() -> None:
    cluster = operator_cluster.serving()
    cluster.edit(replicas=2)
    assert "the operator has not looked at generation 2 yet" in tree(cluster)


@pytest.mark.parametrize("now", ["gone", "there"])
def test_pods_that_status_does_not_know_are_shown_all_the_same(now: str) -> None:
    """An operator that is down has not written of them."""
    cluster = operator_cluster.serving()
    name = cluster.pod(0).name
    if now == "gone":
        cluster.status = cluster.status.model_copy(update={"gangs": []})
    text = tree(cluster)
    assert line_with(text, name)
    assert ("Unknown" in text) == (now == "gone")


def test_a_gangs_faults_and_rebuilds_are_shown() -> None:
    cluster = operator_cluster.serving(recovery={"mode": "InPlace"})
    gang = cluster.gang_status().name
    cluster.reports[gang] = GangReport(
        gang=gang,
        phase="Serving",
        epoch=4294967298,
        ready_ranks=2,
        load_percent=100,
        time=cluster.now,
        faults=(ReportedFault(time=cluster.now, epoch=4294967297, kind="rank_exited", message="rank 1: signal 9"),),
        rebuilds=(
            ReportedRebuild(time=cluster.now, epoch=4294967298, kind="rank_exited", seconds=1.27, replayed_requests=3),
        ),
    )
    cluster.reconcile()
    cluster.wait(120)
    text = tree(cluster)
    assert line_with(text, "fault 2m ago").strip() == "fault 2m ago, epoch 4294967297: rank_exited: rank 1: signal 9"
    shown = line_with(text, "rebuilt 2m ago").strip()
    assert shown == "rebuilt 2m ago, epoch 4294967298: rank_exited, 1.3 s, 3 requests went on"


def test_the_weights_of_a_gang_are_shown_and_what_to_do_where_they_are_lost() -> None:
    cluster = serving(replicas=2)
    for index, condition in ((0, ""), (1, "WeightsLost")):
        gang = cluster.gang_status(index).name
        cluster.reports[gang] = GangReport(
            gang=gang,
            phase="Serving",
            epoch=7,
            ready_ranks=2,
            load_percent=100,
            time=cluster.now,
            weights_version=3,
            weights_condition=condition,
            weights_message=condition and "version 3 is lost; send a full set",
        )
    cluster.reconcile()
    text = tree(cluster)
    assert text.count("weights of version 3") == 1
    assert "WeightsLost: version 3 is lost; send a full set" in text
    assert "to go back to the checkpoint instead" in line_with(text, "WeightsReady")
