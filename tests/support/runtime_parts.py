"""The parts of a leading operator over a FakeKube, without its watches: a test says what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from support.api_objects import START, metadata
from support.fake_kube import FakeKube
from tpmodel_operator import names, records
from tpmodel_operator.api import TPModel
from tpmodel_operator.apply import Applier
from tpmodel_operator.attempts import Attempts
from tpmodel_operator.kube import MODELS, PODS, STATEFUL_SETS, Kube
from tpmodel_operator.lasting import LastingChildren
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.models import ModelStore
from tpmodel_operator.observe import Observer
from tpmodel_operator.observed import GangReport, PodRecord, StatefulSetRecord
from tpmodel_operator.ownership import Ownership
from tpmodel_operator.posting import EventPoster
from tpmodel_operator.queue import Key, Turn
from tpmodel_operator.reconcile import Reconciler
from tpmodel_operator.settings import OperatorSettings
from tpmodel_operator.store import Entry, Store
from tpmodel_operator.tokens import Tokens

KEY = Key("default", "m")
NOW = START + timedelta(seconds=90)


class Clock:
    def __init__(self) -> None:
        self.now = 10_000.0

    def __call__(self) -> float:
        return self.now


class Parts:
    """One operator process; made anew over the same FakeKube it is the process after a crash."""

    def __init__(self, fake: FakeKube, settings: OperatorSettings | None = None) -> None:
        self.fake = fake
        kube: Kube = fake  # type: ignore[assignment]
        self.settings = settings or OperatorSettings(default_image="worker:1")
        self.metrics = Metrics()
        self.clock = Clock()
        self.models = ModelStore()
        self.pods: Store[PodRecord] = Store()
        self.stateful_sets: Store[StatefulSetRecord] = Store()
        self.ownership = Ownership(kube, self.clock)
        self.attempts = Attempts(kube, self.ownership, self.clock)
        self.tokens = Tokens(kube, self.clock)
        self.lasting = LastingChildren(kube, self.settings, self.clock)
        self.reports: dict[str, GangReport] = {}
        self.largest_node: int | None = None
        self.permitted = True
        self.observer = Observer(
            kube,
            pods=self.pods,
            stateful_sets=self.stateful_sets,
            attempts=self.attempts,
            tokens=self.tokens,
            ownership=self.ownership,
            reports=self._reports,
            largest_node=lambda spec: self.largest_node,
            now=lambda: NOW,
        )
        self.applier = Applier(
            kube,
            attempts=self.attempts,
            tokens=self.tokens,
            lasting=self.lasting,
            ownership=self.ownership,
            permit=self._permit,
        )
        self.events = EventPoster(kube, instance="test", now=lambda: START)
        self.reconciler = Reconciler(
            kube,
            models=self.models,
            observer=self.observer,
            applier=self.applier,
            events=self.events,
            settings=self.settings,
            metrics=self.metrics,
            permit=self._permit,
        )

    async def run_pass(self) -> float | None:
        """What the watches hold is brought up to date, then one pass."""
        self.watch()
        due = await self.reconciler.run_pass(Turn(key=KEY, queued=0.0))
        await self.post_events()
        return due

    async def post_events(self) -> None:
        """Everything that waits to be posted is."""
        posting = asyncio.create_task(self.events.run())
        flushing = asyncio.create_task(self.events.flush())
        await asyncio.wait([posting, flushing], return_when=asyncio.FIRST_COMPLETED)
        flushing.cancel()
        if not posting.done():
            posting.cancel()
            return
        await posting

    def watch(self) -> None:
        """As if every watch had just caught up."""
        for uid in list(self.pods.uids(None)):
            self.pods.remove(uid)
        for uid in list(self.stateful_sets.uids(None)):
            self.stateful_sets.remove(uid)
        for (plural, namespace, _), item in self.fake.objects.items():
            uid, version = item["metadata"]["uid"], records.version(item)
            if plural == PODS.plural:
                self.pods.put(uid, Entry(version, namespace, records.pod(item)))
            elif plural == STATEFUL_SETS.plural:
                self.stateful_sets.put(uid, Entry(version, namespace, records.stateful_set(item)))
            elif plural == MODELS.plural:
                self.models.deliver(item)

    def model(self) -> TPModel:
        """The TPModel as stored."""
        return records.tpmodel(self.fake.objects[MODELS.plural, "default", "m"])

    def _permit(self) -> None:
        if not self.permitted:
            raise PermissionError("not the leader")

    def _reports(self, key: Key) -> Mapping[str, GangReport]:
        return self.reports


def stored(fake: FakeKube, plural: str) -> dict[str, Any]:
    """The objects of one kind, by name."""
    return {name: item for (kind, _, name), item in fake.objects.items() if kind == plural}


def create_model(fake: FakeKube, **spec: Any) -> None:
    """A user creates the TPModel m: two pods a gang."""
    body = {
        "apiVersion": "tpmodel.dev/v1alpha1",
        "kind": "TPModel",
        "metadata": metadata("m", generation=1),
        "spec": {"model": {"uri": "hf://organisation/name"}, "device": "cpu", "tensorParallelSize": 2} | spec,
    }
    fake.put(MODELS, body)


def run_pods(fake: FakeKube, *, ready: bool = True) -> None:
    """StatefulSet controller and kubelet: all pods of all StatefulSets exist and run."""
    for name, item in stored(fake, STATEFUL_SETS.plural).items():
        for index in range(item["spec"]["replicas"]):
            if f"{name}-{index}" not in stored(fake, PODS.plural):
                fake.put(PODS, _running_pod(name, index, item, ready=ready))


def _running_pod(gang: str, index: int, stateful_set: Any, *, ready: bool) -> Any:
    labels = stateful_set["spec"]["template"]["metadata"]["labels"] | {names.POD_INDEX: str(index)}
    body = metadata(f"{gang}-{index}", labels=labels)
    del body["uid"]
    return {
        "metadata": body,
        "spec": {"nodeName": "node"},
        "status": {
            "phase": "Running",
            "podIP": f"10.0.0.{index}",
            "conditions": [
                {"type": "Ready", "status": str(ready), "lastTransitionTime": "2026-01-01T00:00:10Z"},
            ],
            "containerStatuses": [
                {
                    "name": names.CONTAINER,
                    "restartCount": 0,
                    "state": {"running": {"startedAt": "2026-01-01T00:00:05Z"}},
                    "lastState": {},
                }
            ],
        },
    }


def end_container(fake: FakeKube, pod: str, code: int, message: str = "") -> None:
    """A container of a pod ends and is not started again yet."""
    item = fake.objects[PODS.plural, "default", pod]
    end = {"exitCode": code, "message": message, "finishedAt": "2026-01-01T00:01:00Z"}
    container = item["status"]["containerStatuses"][0] | {"state": {"terminated": end}}
    status = item["status"] | {"containerStatuses": [container], "conditions": []}
    fake.put(PODS, item | {"status": status})
