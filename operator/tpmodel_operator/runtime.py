"""A leading operator: its watches, its queue and its workers, put together and kept running."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from tpmodel_operator import names, records
from tpmodel_operator.apply import Applier
from tpmodel_operator.attempts import Attempts
from tpmodel_operator.audit import Audit, Audited
from tpmodel_operator.gang_reports import GangReports
from tpmodel_operator.handlers import ModelWatch
from tpmodel_operator.kube import MODELS, PODS, STATEFUL_SETS, ApiError, Json, Kube, Resource
from tpmodel_operator.lasting import LastingChildren
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.models import ModelStore
from tpmodel_operator.node_sizes import NodeSizes
from tpmodel_operator.observe import Observer
from tpmodel_operator.observed import PodRecord, StatefulSetRecord
from tpmodel_operator.ownership import Ownership
from tpmodel_operator.posting import EventPoster
from tpmodel_operator.probes import Health, finished
from tpmodel_operator.queue import Key, Urgency, WorkQueue, work
from tpmodel_operator.reconcile import Reconciler
from tpmodel_operator.settings import OperatorSettings
from tpmodel_operator.store import R, Store
from tpmodel_operator.tokens import Tokens
from tpmodel_operator.watch import Watch

logger = logging.getLogger(__name__)

CRD_PATIENCE_SECONDS = 2.0
TIDY_SECONDS = 600.0
FLUSH_SECONDS = 2.0


class Runtime:
    """All parts of a leading operator."""

    def __init__(
        self,
        kube: Kube,
        settings: OperatorSettings,
        *,
        metrics: Metrics,
        health: Health,
        permit: Callable[[], None],
        take_signals: Callable[[], None],
    ) -> None:
        """Nothing runs yet.

        Args:
            kube: the API server.
            settings: of the process.
            metrics: of the process.
            health: gets the checks of all parts.
            permit: raises where this process must not write any more.
            take_signals: makes the process's signals the caller's again.
        """
        self._kube = kube
        self._settings = settings
        self._metrics = metrics
        self._health = health
        self._queue = WorkQueue()
        self._models = ModelStore()
        self._pods: Store[PodRecord] = Store()
        self._stateful_sets: Store[StatefulSetRecord] = Store()
        self._ownership = Ownership(kube)
        self._attempts = Attempts(kube, self._ownership)
        self._tokens = Tokens(kube)
        self._lasting = LastingChildren(kube, settings)
        self._reports = GangReports(self._pods, changed=self._queue.add)
        self._node_sizes = NodeSizes(
            kube, models=self._models.readable, changed=self._queue.add, period=settings.resync_seconds
        )
        self._events = EventPoster(kube, instance=settings.pod_name)
        self._namespaces = settings.watch_namespaces or (None,)
        self._watches = [
            watch
            for namespace in self._namespaces
            for watch in (
                self._watch(PODS, namespace, records.pod, self._pods, alarming=records.pod_alarms),
                self._watch(STATEFUL_SETS, namespace, records.stateful_set, self._stateful_sets),
            )
        ]
        self._model_watch = ModelWatch(kube.configuration, self._deliver, settings.watch_namespaces, take_signals)
        self._audit = Audit(kube, self._audited(), period=settings.resync_seconds, metrics=metrics)
        self._reconciler = Reconciler(
            kube,
            models=self._models,
            observer=Observer(
                kube,
                pods=self._pods,
                stateful_sets=self._stateful_sets,
                attempts=self._attempts,
                tokens=self._tokens,
                ownership=self._ownership,
                reports=self._reports.of,
                largest_node=self._node_sizes.largest,
            ),
            applier=Applier(
                kube,
                attempts=self._attempts,
                tokens=self._tokens,
                lasting=self._lasting,
                ownership=self._ownership,
                permit=permit,
            ),
            events=self._events,
            settings=settings,
            metrics=metrics,
            permit=permit,
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._workers: list[asyncio.Task[None]] = []
        metrics.queue_depth.set_function(lambda: self._queue.depth)
        metrics.models.set_function(lambda: len(self._models))
        health.require_alive(lambda: self._audit.failures)
        health.require_ready(lambda: [f"{watch} is not in yet" for watch in self._watches if not watch.synced.is_set()])

    async def run(self) -> None:
        """Works until stopped. A part that ends by itself ends all: its error is raised."""
        await self._wait_for_crd()
        for watch in self._watches:
            self._start(watch.run(), f"watch of {watch}")
        # Decisions need to know all pods: one that is merely unknown yet would look like one that is gone.
        synced = asyncio.gather(*(watch.synced.wait() for watch in self._watches))
        await self._unless_ended(synced)
        models = self._start(self._model_watch.run(), "watch of TPModels")
        await self._unless_ended(asyncio.ensure_future(self._model_watch.started.wait()))
        self._start(self._audit.run(), "audit")
        self._start(self._reports.run(), "reports of gangs")
        self._start(self._node_sizes.run(), "sizes of nodes")
        self._start(self._events.run(), "posting of Events")
        self._start(self._tidy(), "tidying")
        self._workers = [
            self._start(work(self._queue, self._reconciler.run_pass), f"worker {number}")
            for number in range(self._settings.workers)
        ]
        await self._unless_ended(models)

    async def finish_passes(self, seconds: float) -> None:
        """No pass begins any more; those under way may end, and their Events may be posted."""
        self._queue.close()
        if self._workers:
            await asyncio.wait(self._workers, timeout=seconds)
        if seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._events.flush(), FLUSH_SECONDS)

    async def close(self) -> None:
        """Ends everything, at once."""
        self._model_watch.stop.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---------------------------------------------------------------------------------------------------- parts

    def _watch(
        self,
        resource: Resource,
        namespace: str | None,
        parse: Callable[[Json], R | None],
        store: Store[R],
        *,
        alarming: Callable[[R | None, R | None], bool] = lambda before, after: False,
    ) -> Watch[R]:
        return Watch(
            self._kube,
            resource,
            namespace,
            parse=parse,
            store=store,
            changed=self._object_changed,
            metrics=self._metrics,
            alarming=alarming,
        )

    def _audited(self) -> list[Audited]:
        spaces = self._namespaces
        watched = names.WATCH_SELECTOR
        return [
            Audited(resource=PODS, namespaces=spaces, selector=watched, held=self._pods.versions),
            Audited(resource=STATEFUL_SETS, namespaces=spaces, selector=watched, held=self._stateful_sets.versions),
            Audited(resource=MODELS, namespaces=spaces, selector="", held=self._models.versions),
        ]

    def _object_changed(self, key: Key, alarm: float | None) -> None:
        self._queue.add(key, Urgency.OTHER if alarm is None else Urgency.FAULT, event=alarm)

    def _deliver(self, item: Json, deleted: bool) -> None:
        if (change := self._models.deliver(item, deleted=deleted)) is not None:
            self._queue.add(change.key, Urgency.SPEC if change.spec else Urgency.OTHER)

    async def _wait_for_crd(self) -> None:
        """kopf looks for it once only."""
        told = ""
        while True:
            try:
                async for _ in self._kube.list(MODELS, self._namespaces[0], page=1, metadata_only=True):
                    return
            except ApiError as error:
                if str(error) != told:
                    logger.warning("waiting: TPModels cannot be listed: %s", error)
                told = str(error)
            await asyncio.sleep(CRD_PATIENCE_SECONDS)

    async def _tidy(self) -> None:
        """Forgets what was remembered of objects that are gone."""
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            sets = list(self._stateful_sets.all())
            self._attempts.keep({(record.namespace, record.name) for record in sets})
            self._tokens.keep({record.uid for record in sets})
            self._lasting.keep(self._models.uids())
            self._ownership.keep(self._models.uids())

    # ---------------------------------------------------------------------------------------------------- tasks

    def _start(self, part: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.create_task(part, name=name)
        self._tasks.append(task)
        self._health.require_alive(finished(task))
        return task

    async def _unless_ended(self, awaited: asyncio.Future[Any]) -> None:
        """Waits; but when a part ends first, that is raised."""
        await asyncio.wait([awaited, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in self._tasks:
            if task.done() and task is not awaited:
                error = None if task.cancelled() else task.exception()
                raise RuntimeError(f"{task.get_name()} has ended") from error
        await awaited
