"""GangStatus of the leader pods: asked side by side, unknown when silent, and a pass only for news."""

import asyncio
from dataclasses import replace

import grpc.aio
import pytest

from support.api_objects import START, pod, worker
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_operator import records
from tpmodel_operator.gang_reports import AT_ONCE, GangReports, ask_leader, is_news, report_of
from tpmodel_operator.observed import GangReport, PodRecord, ReportedFault, ReportedRebuild
from tpmodel_operator.queue import Key
from tpmodel_operator.store import Entry, Store

REPORT = GangReport(gang="m-0-abcde", phase="Loading", epoch=1, ready_ranks=2, load_percent=10, time=START)


def store_of(*names: str) -> Store[PodRecord]:
    store: Store[PodRecord] = Store()
    for name in names:
        item = pod(name, model=name.partition("-")[0], podIP="10.0.0.1", containerStatuses=worker(running={}))
        store.put(item["metadata"]["uid"], Entry(1, "default", records.pod(item)))
    return store


class Leaders:
    """Answers by gang; no answer where there is none."""

    def __init__(self, **answers: GangReport) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.at_once = self.most = 0

    async def __call__(self, leader: PodRecord) -> GangReport | None:
        self.asked.append(leader.name)
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        return self.answers.get(leader.model)


async def test_only_leader_pods_that_run_are_asked():
    store = store_of("m-0-abcde-0", "m-0-abcde-1")
    waiting = records.pod(pod("n-0-abcde-0", model="n"))
    store.put("waiting", Entry(1, "default", waiting))
    leaders = Leaders(m=REPORT)
    await GangReports(store, changed=lambda key: None, ask=leaders).round()
    assert leaders.asked == ["m-0-abcde-0"]


async def test_news_bring_a_pass_and_repetitions_none():
    told: list[Key] = []
    leaders = Leaders(m=REPORT)
    reports = GangReports(store_of("m-0-abcde-0"), changed=told.append, ask=leaders)
    await reports.round()
    await reports.round()
    leaders.answers["m"] = replace(REPORT, load_percent=12)
    await reports.round()
    assert told == [Key("default", "m")]
    leaders.answers["m"] = replace(REPORT, phase="Serving")
    await reports.round()
    assert len(told) == 2
    assert reports.of(Key("default", "m"))["m-0-abcde"].phase == "Serving"


async def test_a_silent_leader_is_unknown():
    told: list[Key] = []
    leaders = Leaders(m=REPORT)
    reports = GangReports(store_of("m-0-abcde-0"), changed=told.append, ask=leaders)
    await reports.round()
    leaders.answers.clear()
    await reports.round()
    assert reports.of(Key("default", "m")) == {}
    assert len(told) == 1


async def test_a_leader_that_stays_silent_is_asked_less_often():
    leaders = Leaders()
    reports = GangReports(store_of("m-0-abcde-0"), changed=lambda key: None, ask=leaders)
    for number in range(1, 28):
        await reports.round(number)
    assert len(leaders.asked) == 3 + 24 // 6


async def test_many_are_asked_side_by_side_but_not_all_at_once():
    leaders = Leaders()
    store = store_of(*(f"m{number}-0-abcde-0" for number in range(3 * AT_ONCE)))
    await GangReports(store, changed=lambda key: None, ask=leaders).round()
    assert len(leaders.asked) == 3 * AT_ONCE
    assert 1 < leaders.most <= AT_ONCE


async def test_reports_of_gangs_that_are_gone_are_forgotten():
    store = store_of("m-0-abcde-0")
    reports = GangReports(store, changed=lambda key: None, ask=Leaders(m=REPORT))
    await reports.round()
    store.remove("uid-of-m-0-abcde-0")
    await reports.round()
    assert reports.of(Key("default", "m")) == {}


@pytest.mark.parametrize(
    ("change", "news"),
    [
        ({}, False),
        ({"phase": "Serving"}, True),
        ({"epoch": 2}, True),
        ({"ready_ranks": 1}, True),
        ({"load_percent": 14}, False),
        ({"load_percent": 15}, True),
    ],
)
def test_what_is_news(change: dict, news: bool):
    assert is_news(REPORT, replace(REPORT, **change)) == news


def test_an_answer_as_decisions_see_it():
    engine = worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING, epoch=2**33, ready_ranks=4, load_percent=99.6)
    report = report_of("m-0-abcde", worker_pb2.GangStatusResponse(engine=engine), START)
    assert (report.phase, report.epoch, report.ready_ranks, report.load_percent) == ("Serving", 2**33, 4, 99)


def test_what_an_answer_says_of_the_weights_is_news():
    engine = worker_pb2.EngineState(
        weight_version=3,
        weights_condition="WeightsLost",
        weights_message="send a full set",
        persisted_version=2,
        persist_error="the disk is full",
    )
    report = report_of("m-0-abcde", worker_pb2.GangStatusResponse(engine=engine), START)
    said = (report.weights_version, report.weights_condition, report.weights_message)
    assert said == (3, "WeightsLost", "send a full set")
    assert (report.weights_kept, report.weights_keeping_error) == (2, "the disk is full")
    assert is_news(replace(report, weights_version=2), report)
    assert is_news(replace(report, weights_condition=""), report)
    assert is_news(replace(report, weights_kept=0), report)


class Status(worker_pb2_grpc.StatusServiceServicer):
    async def GangStatus(self, request, context):  # noqa: N802 - the name is the proto's
        return worker_pb2.GangStatusResponse(engine=worker_pb2.EngineState(phase=worker_pb2.PHASE_LOADING, epoch=7))


async def test_a_leader_is_asked_over_grpc(monkeypatch: pytest.MonkeyPatch):
    server = grpc.aio.server()
    worker_pb2_grpc.add_StatusServiceServicer_to_server(Status(), server)
    monkeypatch.setattr("tpmodel_operator.names.HEALTH_PORT", server.add_insecure_port("127.0.0.1:0"))
    await server.start()
    leader = records.pod(pod("m-0-abcde-0", podIP="127.0.0.1"))
    assert leader is not None
    answer = await ask_leader(leader)
    assert answer is not None
    assert (answer.gang, answer.phase, answer.epoch) == ("m-0-abcde", "Loading", 7)
    await server.stop(0)
    assert await ask_leader(leader) is None


def test_faults_and_rebuilds_are_read_and_are_news():
    """W26: what an engine says of the worlds that it lost and built again."""
    engine = worker_pb2.EngineState(
        phase=worker_pb2.PHASE_SERVING,
        epoch=(1 << 32) | 2,
        last_faults=[
            worker_pb2.Fault(unix_seconds=START.timestamp(), epoch=(1 << 32) | 1, kind="rank_exited", message="rank 1")
        ],
        last_rebuilds=[
            worker_pb2.Rebuild(
                unix_seconds=START.timestamp(),
                epoch=(1 << 32) | 2,
                kind="rank_exited",
                seconds=1.25,
                replayed_requests=3,
            )
        ],
    )
    answer = worker_pb2.GangStatusResponse(engine=engine, model_revision="c" * 40)
    report = report_of("m-0-abcde", answer, START)
    assert report.faults == (ReportedFault(time=START, epoch=(1 << 32) | 1, kind="rank_exited", message="rank 1"),)
    assert report.rebuilds == (
        ReportedRebuild(time=START, epoch=(1 << 32) | 2, kind="rank_exited", seconds=1.25, replayed_requests=3),
    )
    assert report.model_revision == "c" * 40
    assert is_news(replace(report, faults=()), report)
    assert is_news(replace(report, rebuilds=()), report)
    assert is_news(replace(report, model_revision=""), report)
    assert not is_news(replace(report, time=START.replace(hour=5)), report)
