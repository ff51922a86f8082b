"""The history of a gang's faults and rebuilds, as status and Events tell it."""

from dataclasses import replace
from datetime import timedelta

from support.operator_cluster import Cluster, serving
from tpmodel_operator.api_status import KEPT
from tpmodel_operator.observed import GangReport, ReportedFault, ReportedRebuild

FIRST = 1 << 32


def in_place() -> Cluster:
    cluster = serving(recovery={"mode": "InPlace"})
    cluster.wait(60)
    return cluster


def tell(cluster: Cluster, *, faults: int = 0, rebuilds: int = 0, since: int = 0) -> None:
    """The engine reports so many of both, one a minute, beginning with the number `since`."""
    times = [cluster.now + timedelta(minutes=number) for number in range(16)]
    gang = cluster.gang_status().name
    cluster.reports[gang] = GangReport(
        gang=gang,
        phase="Serving",
        epoch=FIRST + 1 + rebuilds,
        ready_ranks=2,
        load_percent=100,
        time=cluster.now,
        faults=tuple(
            ReportedFault(time=times[number], epoch=FIRST + 1 + number, kind="rank_exited", message=f"fault {number}")
            for number in range(since, since + faults)
        ),
        rebuilds=tuple(
            ReportedRebuild(
                time=times[number], epoch=FIRST + 2 + number, kind="rank_exited", seconds=1.25, replayed_requests=3
            )
            for number in range(since, since + rebuilds)
        ),
    )


def test_what_the_engine_reports_is_in_status_with_its_epoch_and_costs_nothing():
    cluster = in_place()
    tell(cluster, faults=1, rebuilds=1)
    cluster.reconcile()
    gang = cluster.gang_status()
    assert [(fault.epoch, fault.kind, fault.message) for fault in gang.faults] == [
        (FIRST + 1, "rank_exited", "fault 0")
    ]
    assert [(rebuild.epoch, rebuild.milliseconds, rebuild.replayed_requests) for rebuild in gang.rebuilds] == [
        (FIRST + 2, 1250, 3)
    ]
    assert (gang.epoch, gang.attempt, gang.restarts_total) == (FIRST + 2, 1, 0)


def test_each_is_told_once():
    cluster = in_place()
    tell(cluster, faults=1, rebuilds=1)
    cluster.reconcile()
    cluster.reconcile()
    tell(cluster, faults=2, rebuilds=2)
    cluster.reconcile()
    assert (cluster.reasons().count("GangFault"), cluster.reasons().count("GangRebuilt")) == (2, 2)
    assert any(
        event.message.endswith(f"epoch {FIRST + 2}, 1250 ms after the fault was seen (rank_exited); 3 requests went on")
        for event in cluster.events
    )


def test_the_last_ones_are_kept():
    cluster = in_place()
    tell(cluster, faults=10)
    cluster.reconcile()
    assert [fault.message for fault in cluster.gang_status().faults] == [f"fault {n}" for n in range(10 - KEPT, 10)]


def test_an_engine_that_starts_anew_or_does_not_answer_takes_nothing_away():
    cluster = in_place()
    tell(cluster, faults=2)
    cluster.reconcile()
    cluster.reports.clear()
    cluster.reconcile()
    tell(cluster, faults=1, since=5)
    cluster.reconcile()
    assert [fault.message for fault in cluster.gang_status().faults] == ["fault 0", "fault 1", "fault 5"]


def test_a_restart_keeps_the_history():
    cluster = in_place()
    tell(cluster, faults=2)
    cluster.reconcile()
    cluster.end_container(cluster.pod(0), 75)
    cluster.settle()
    assert cluster.gang_status().attempt == 2
    assert len(cluster.gang_status().faults) == 2


def test_a_long_message_is_cut():
    cluster = in_place()
    tell(cluster, faults=1)
    gang = cluster.gang_status().name
    (fault,) = cluster.reports[gang].faults
    cluster.reports[gang] = replace(cluster.reports[gang], faults=(replace(fault, message="x" * 3000),))
    cluster.reconcile()
    (kept,) = cluster.gang_status().faults
    assert len(kept.message) == 240
    assert kept.message.endswith("...")
