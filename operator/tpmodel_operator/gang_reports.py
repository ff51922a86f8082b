"""Asks the leader pods how their gangs are, for status and Events only: no answer means unknown, never a restart."""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import NoReturn

import grpc
import grpc.aio

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_operator import names
from tpmodel_operator.observed import GangReport, PodRecord, ReportedFault, ReportedRebuild
from tpmodel_operator.queue import Key
from tpmodel_operator.store import Store

logger = logging.getLogger(__name__)

PERIOD_SECONDS = 10.0
DEADLINE_SECONDS = 2.0
AT_ONCE = 32
LEAST_PROGRESS = 5
"""Percent of loading that are worth a pass."""
SILENT_ROUNDS = 3
"""A leader that did not answer so often is asked in one round of six only: mostly nothing can reach it."""

Ask = Callable[[PodRecord], Awaitable[GangReport | None]]


class GangReports:
    """The latest answers."""

    def __init__(self, pods: Store[PodRecord], *, changed: Callable[[Key], None], ask: Ask | None = None) -> None:
        """changed: called with a TPModel whose status has something new to show."""
        self._pods = pods
        self._changed = changed
        self._ask = ask or ask_leader
        self._reports: defaultdict[Key, dict[str, GangReport]] = defaultdict(dict)
        self._silent: dict[str, int] = {}
        self._room = asyncio.Semaphore(AT_ONCE)

    def of(self, key: Key) -> Mapping[str, GangReport]:
        """The answers of a TPModel's gangs, by gang."""
        return self._reports.get(key, {})

    async def run(self) -> NoReturn:
        """Asks all leaders, spread over the period, for ever."""
        number = 0
        # Never used; but without a channel, gRPC ends its thread, and starts another for the next one.
        async with grpc.aio.insecure_channel("localhost"):
            while True:
                number += 1
                started = asyncio.get_running_loop().time()
                await self.round(number, pause=PERIOD_SECONDS)
                await asyncio.sleep(max(0.5, started + PERIOD_SECONDS - asyncio.get_running_loop().time()))

    async def round(self, number: int = 1, *, pause: float = 0.0) -> None:
        """Asks every leader that runs, once."""
        leaders = [pod for pod in self._pods.all() if can_answer(pod)]
        self._forget(leaders)
        async with asyncio.TaskGroup() as group:
            for place, pod in enumerate(leaders):
                if self._silent.get(pod.uid, 0) >= SILENT_ROUNDS and (number + place) % 6:
                    continue
                await self._room.acquire()
                group.create_task(self._hear(pod))
                if pause:
                    await asyncio.sleep(pause / len(leaders))

    async def _hear(self, pod: PodRecord) -> None:
        try:
            report = await self._ask(pod)
        finally:
            self._room.release()
        reports = self._reports[Key(pod.namespace, pod.model)]
        before = reports.get(pod.gang)
        if report is None:
            self._silent[pod.uid] = self._silent.get(pod.uid, 0) + 1
            reports.pop(pod.gang, None)
            return
        self._silent.pop(pod.uid, None)
        reports[pod.gang] = report
        if before is None or is_news(before, report):
            self._changed(Key(pod.namespace, pod.model))

    def _forget(self, leaders: list[PodRecord]) -> None:
        alive = {pod.uid for pod in leaders}
        self._silent = {uid: count for uid, count in self._silent.items() if uid in alive}
        gangs = {(Key(pod.namespace, pod.model), pod.gang) for pod in leaders}
        for key, reports in list(self._reports.items()):
            for gang in [name for name in reports if (key, name) not in gangs]:
                del reports[gang]
            if not reports:
                del self._reports[key]


def can_answer(pod: PodRecord) -> bool:
    """Whether it is a leader pod whose supervisor may be listening."""
    return pod.index == 0 and pod.running and bool(pod.ip) and pod.deleting_since is None


def is_news(before: GangReport, report: GangReport) -> bool:
    """Whether users would see the difference."""
    if replace(before, time=report.time, load_percent=report.load_percent) != report:
        return True
    moved = abs(report.load_percent - before.load_percent)
    return moved >= LEAST_PROGRESS or (moved > 0 and report.load_percent == 100)


async def ask_leader(pod: PodRecord) -> GangReport | None:
    """GangStatus of the gang's leader pod; None where it does not answer in time."""
    host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
    # Made for one call: a thousand kept open would cost more memory than they save time.
    async with grpc.aio.insecure_channel(f"{host}:{names.HEALTH_PORT}") as channel:
        stub = worker_pb2_grpc.StatusServiceStub(channel)
        try:
            answer = await stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=DEADLINE_SECONDS)
        except grpc.aio.AioRpcError as error:
            logger.debug("%s of %s/%s: %s", error.code(), pod.namespace, pod.name, error.details())
            return None
    return report_of(pod.gang, answer, datetime.now(UTC))


def report_of(gang: str, answer: worker_pb2.GangStatusResponse, now: datetime) -> GangReport:
    """The answer as decisions see it."""
    engine = answer.engine
    return GangReport(
        gang=gang,
        phase=worker_pb2.Phase.Name(engine.phase).removeprefix("PHASE_").capitalize(),
        epoch=engine.epoch,
        ready_ranks=engine.ready_ranks,
        load_percent=int(engine.load_percent),
        time=now,
        model_revision=answer.model_revision,
        faults=tuple(map(_fault, engine.last_faults)),
        rebuilds=tuple(map(_rebuild, engine.last_rebuilds)),
        weights_version=engine.weight_version,
        weights_condition=engine.weights_condition,
        weights_message=engine.weights_message,
        weights_kept=engine.persisted_version,
        weights_keeping_error=engine.persist_error,
    )


def _fault(fault: worker_pb2.Fault) -> ReportedFault:
    return ReportedFault(
        time=datetime.fromtimestamp(fault.unix_seconds, UTC),
        epoch=fault.epoch,
        kind=fault.kind,
        message=fault.message,
    )


def _rebuild(rebuild: worker_pb2.Rebuild) -> ReportedRebuild:
    return ReportedRebuild(
        time=datetime.fromtimestamp(rebuild.unix_seconds, UTC),
        epoch=rebuild.epoch,
        kind=rebuild.kind,
        seconds=rebuild.seconds,
        replayed_requests=rebuild.replayed_requests,
    )
