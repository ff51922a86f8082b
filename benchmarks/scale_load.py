"""What the scale benchmark does to a cluster, with the operator's own client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from tpmodel_operator import names, records
from tpmodel_operator.actions import EnsureGang, EnsureModelChildren
from tpmodel_operator.api import TPModel
from tpmodel_operator.children import owned_by
from tpmodel_operator.kube import (
    CONFIG_MAPS,
    MODELS,
    NETWORK_POLICIES,
    PODS,
    SECRETS,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
    ApiError,
    Json,
    Kube,
    Resource,
)
from tpmodel_operator.resources import gang_children, model_children
from tpmodel_operator.revision import revision
from tpmodel_operator.settings import OperatorSettings

IMAGE = "registry.example/tpmodel-worker:scale"
AT_ONCE = 16
"""As many as the operator has workers."""

CHILDREN_OF_A_MODEL = {
    STATEFUL_SETS: 1,
    SECRETS: 1,
    CONFIG_MAPS: 1,
    SERVICES: 3,
    SERVICE_ACCOUNTS: 1,
    NETWORK_POLICIES: 2,
}


def model_body(name: str, namespace: str, pods: int) -> Json:
    """A TPModel of one gang with so many pods."""
    return {
        "apiVersion": MODELS.api_version,
        "kind": MODELS.kind,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"model": {"uri": "hf://organisation/name"}, "device": "cpu", "tensorParallelSize": pods},
    }


async def side_by_side(calls: Iterable[Awaitable[Any]], limit: int = AT_ONCE) -> None:
    """Awaits all, so many at once."""
    room = asyncio.Semaphore(limit)

    async def one(call: Awaitable[Any]) -> None:
        async with room:
            await call

    await asyncio.gather(*(one(call) for call in calls))


async def create(kube: Kube, resource: Resource, namespace: str, body: Json) -> Json:
    """Creates an object; a call that gets no answer is made again, as the operator does it too."""
    for _ in range(5):
        try:
            return await kube.create(resource, namespace, body)
        except ApiError as error:
            if error.conflict:
                return await kube.get(resource, namespace, body["metadata"]["name"])
            if 0 < error.status < 500:
                raise
    raise TimeoutError(f"{resource.plural} {body['metadata']['name']} could not be made")


async def apply(kube: Kube, resource: Resource, namespace: str, body: Json) -> Json:
    """Applies an object, likewise."""
    for _ in range(5):
        try:
            return await kube.apply(resource, namespace, body)
        except ApiError as error:
            if 0 < error.status < 500:
                raise
    raise TimeoutError(f"{resource.plural} {body['metadata']['name']} could not be made")


async def create_models(kube: Kube, namespace: str, count: int, pods: int) -> None:
    """Creates TPModels m-0, m-1, ..."""
    bodies = (model_body(f"m-{number}", namespace, pods) for number in range(count))
    await side_by_side(create(kube, MODELS, namespace, body) for body in bodies)


async def create_models_and_children(kube: Kube, namespace: str, count: int, pods: int) -> None:
    """The floor: the same objects by the same calls in the same order, and nobody who watches or decides."""
    await side_by_side(_model_and_children(kube, namespace, f"m-{number}", pods) for number in range(count))


async def _model_and_children(kube: Kube, namespace: str, name: str, pods: int) -> None:
    model = records.tpmodel(await create(kube, MODELS, namespace, model_body(name, namespace, pods)))
    settings = OperatorSettings(default_image=IMAGE)
    shared = model_children(model, EnsureModelChildren(disruptable_pods=None), settings)
    await asyncio.gather(*(apply(kube, _RESOURCES[body["kind"]], namespace, body) for body in shared))
    *others, stateful_set = gang_children(model, _gang(model), token="t" * 43)
    uid = (await create(kube, STATEFUL_SETS, namespace, stateful_set))["metadata"]["uid"]
    owned = (owned_by(stateful_set["metadata"]["name"], uid, body) for body in others)
    await asyncio.gather(*(_send(kube, namespace, body) for body in owned))


async def _send(kube: Kube, namespace: str, body: Json) -> None:
    resource = _RESOURCES[body["kind"]]
    if resource is NETWORK_POLICIES:
        await apply(kube, resource, namespace, body)
    else:
        await create(kube, resource, namespace, body)


def _gang(model: TPModel) -> EnsureGang:
    hashed = revision(model.spec, IMAGE)
    return EnsureGang(name=names.gang_name(model.name, 0, hashed), index=0, revision=hashed, image=IMAGE, attempt=1)


_RESOURCES: dict[str, Resource] = {resource.kind: resource for resource in CHILDREN_OF_A_MODEL}


async def count(kube: Kube, resource: Resource, namespace: str) -> int:
    """Objects of one kind in a namespace, without reading them."""
    async for page in kube.list(resource, namespace, page=1):
        return len(page.items) + page.remaining
    return 0


async def has_children(kube: Kube, namespace: str, models: int) -> bool:
    """Whether every child of so many TPModels of one gang exists."""
    for resource, each in CHILDREN_OF_A_MODEL.items():
        if await count(kube, resource, namespace) < each * models:
            return False
    return True


async def until(condition: Callable[[], Awaitable[bool]], *, seconds: float, what: str, period: float = 0.25) -> float:
    """Waits; returns how long it took."""
    started = time.monotonic()
    while not await condition():
        if time.monotonic() - started > seconds:
            raise TimeoutError(f"{what}: not within {seconds} s")
        await asyncio.sleep(period)
    return time.monotonic() - started


@dataclass
class PodWatch:
    """When pods came and went, as a client of the API server sees it."""

    kube: Kube
    namespace: str
    pods: dict[str, Json] = field(default_factory=dict)
    """Metadata and status of the pods that exist, by UID."""
    deleted: dict[str, float] = field(default_factory=dict)
    """When a pod's deletion was accepted, by UID."""

    async def run(self) -> None:
        """For ever."""
        while True:
            with contextlib.suppress(ApiError):
                await self._list_and_watch()

    async def _list_and_watch(self) -> None:
        version = ""
        present: dict[str, Json] = {}
        async for page in self.kube.list(PODS, self.namespace, selector=names.WATCH_SELECTOR):
            version = page.resource_version
            present |= {item["metadata"]["uid"]: item for item in page.items}
        for uid in set(self.pods) - set(present):
            self._gone(uid)
        for item in present.values():
            self._seen(item)
        while True:
            events = self.kube.watch(PODS, self.namespace, resource_version=version, selector=names.WATCH_SELECTOR)
            async for event in events:
                version = event.object["metadata"]["resourceVersion"]
                if event.type == "DELETED":
                    self._gone(event.object["metadata"]["uid"])
                elif event.type != "BOOKMARK":
                    self._seen(event.object)

    def _seen(self, item: Json) -> None:
        if "deletionTimestamp" in item["metadata"]:
            self._gone(item["metadata"]["uid"])
        else:
            self.pods[item["metadata"]["uid"]] = _small(item)

    def _gone(self, uid: str) -> None:
        self.deleted.setdefault(uid, time.monotonic())
        self.pods.pop(uid, None)

    def of(self, model: str) -> dict[str, Json]:
        """A model's pods by UID."""
        return {uid: pod for uid, pod in self.pods.items() if pod["metadata"]["labels"][names.MODEL_LABEL] == model}


def _small(item: Json) -> Json:
    metadata = item["metadata"]
    return {
        "metadata": {key: metadata[key] for key in ("name", "uid", "labels")},
        "status": {key: item["status"].get(key) for key in ("containerStatuses", "conditions")},
    }


async def end_container(kube: Kube, namespace: str, pod: Json) -> float:
    """The worker's container of a pod ends with 75 and is started again; returns when that was sent."""
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    terminated = {
        "exitCode": 75,
        "message": "rank 1: ended by the benchmark",
        "finishedAt": moment,
        "startedAt": moment,
    }
    containers = [
        status | {"restartCount": status["restartCount"] + 1, "lastState": {"terminated": terminated}}
        for status in pod["status"]["containerStatuses"]
    ]
    body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"containerStatuses": containers}}
    started = time.monotonic()
    await kube.merge(PODS, namespace, pod["metadata"]["name"], body, subresource="status")
    return started


async def fault(kube: Kube, watch: PodWatch, model: str) -> float:
    """Ends a container of a model's gang; returns seconds until the last delete that follows was accepted."""
    pods = watch.of(model)
    victim = max(pods.values(), key=lambda pod: pod["metadata"]["name"])
    started = await end_container(kube, watch.namespace, victim)
    while not all(uid in watch.deleted for uid in pods):
        if time.monotonic() - started > 120:
            raise TimeoutError(f"the gang of {model} was not restarted")
        await asyncio.sleep(0.002)
    return max(watch.deleted[uid] for uid in pods) - started


async def churn(kube: Kube, namespace: str, pods: int, *, ready: asyncio.Event) -> None:
    """Foreign pods come, and then are replaced without end, as fast as eight clients can; ready: all have come."""
    body: Json = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"labels": {"app": "foreign"}},
        "spec": {"containers": [{"name": "c", "image": "foreign"}], "terminationGracePeriodSeconds": 0},
    }

    def named(number: int) -> Json:
        return body | {"metadata": body["metadata"] | {"name": f"foreign-{number}"}}

    await side_by_side((kube.create(PODS, namespace, named(number)) for number in range(pods)), limit=8)
    ready.set()
    while True:
        for number in range(0, pods, 8):
            block = range(number, min(number + 8, pods))
            await asyncio.gather(
                *(kube.discard(PODS, namespace, f"foreign-{index}", grace_seconds=0) for index in block)
            )
            await asyncio.gather(*(kube.create(PODS, namespace, named(index)) for index in block))
