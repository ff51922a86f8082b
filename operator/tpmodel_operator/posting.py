"""Posts Kubernetes Events about TPModels. The same one again is counted, not repeated.

They are posted one after the other, beside the passes: no gang waits for what is said about it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import NoReturn

from tpmodel_operator import clock, names
from tpmodel_operator.actions import Event
from tpmodel_operator.api import GROUP, KIND, VERSION, TPModel
from tpmodel_operator.kube import EVENTS, ApiError, Json, Kube

logger = logging.getLogger(__name__)

MOST_WAITING = 10_000
REMEMBERED = 2000
"""Events whose counts are kept."""
LONGEST_MESSAGE = 1024
"""The API server refuses longer ones."""


class EventPoster:
    """Posts Events; one that cannot be posted is logged and fails no pass."""

    def __init__(self, kube: Kube, *, instance: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """instance: the operator pod's name."""
        self._kube = kube
        self._instance = instance
        self._now = now
        self._counts: OrderedDict[str, int] = OrderedDict()
        self._waiting: asyncio.Queue[Json] = asyncio.Queue(MOST_WAITING)

    def post(self, model: TPModel, events: Iterable[Event]) -> None:
        """Logs them, and leaves them to be posted."""
        for event in events:
            level = logging.WARNING if event.type == "Warning" else logging.INFO
            who = {"model": f"{model.namespace}/{model.name}"}
            logger.log(level, "%s: %s", event.reason, event.message, extra=who)
            try:
                self._waiting.put_nowait(event_body(model, event, now=self._now(), instance=self._instance))
            except asyncio.QueueFull:
                logger.warning("too many Events wait: this one is not posted", extra=who)

    async def run(self) -> NoReturn:
        """Posts for ever."""
        while True:
            body = await self._waiting.get()
            try:
                await self._post(body)
            except ApiError as error:
                if not error.namespace_ends:
                    logger.warning("Event %s was not posted: %s", body["metadata"]["name"], error)
            self._waiting.task_done()

    async def flush(self) -> None:
        """Returns when all have been posted."""
        await self._waiting.join()

    async def _post(self, body: Json) -> None:
        namespace, name = body["metadata"]["namespace"], body["metadata"]["name"]
        if name not in self._counts:
            if await self._create(namespace, body):
                return
            # Posted by the process before this one.
            self._counts[name] = int((await self._kube.get(EVENTS, namespace, name)).get("count") or 1)
        count = self._counts[name] + 1
        try:
            await self._kube.merge(EVENTS, namespace, name, {"count": count, "lastTimestamp": body["lastTimestamp"]})
        except ApiError as error:
            if not error.not_found:
                raise
            await self._create(namespace, body)  # the server keeps Events for an hour
        else:
            self._remember(name, count)

    async def _create(self, namespace: str, body: Json) -> bool:
        """Whether there was none like it."""
        try:
            await self._kube.create(EVENTS, namespace, body)
        except ApiError as error:
            if error.conflict:
                return False
            raise
        self._remember(body["metadata"]["name"], 1)
        return True

    def _remember(self, name: str, count: int) -> None:
        self._counts[name] = count
        self._counts.move_to_end(name)
        while len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)


def event_body(model: TPModel, event: Event, *, now: datetime, instance: str) -> Json:
    """The Event; equal ones of a TPModel have equal names."""
    message = event.message if len(event.message) <= LONGEST_MESSAGE else event.message[: LONGEST_MESSAGE - 3] + "..."
    identity = "\0".join((model.uid, event.type, event.reason, message))
    time = clock.text(now)
    return {
        "apiVersion": EVENTS.api_version,
        "kind": EVENTS.kind,
        "metadata": {
            "name": f"{model.name}.{hashlib.sha256(identity.encode()).hexdigest()[:16]}",
            "namespace": model.namespace,
        },
        "involvedObject": {
            "apiVersion": f"{GROUP}/{VERSION}",
            "kind": KIND,
            "name": model.name,
            "namespace": model.namespace,
            "uid": model.uid,
            "resourceVersion": model.resource_version,
        },
        "type": event.type,
        "reason": event.reason,
        "message": message,
        "count": 1,
        "firstTimestamp": time,
        "lastTimestamp": time,
        "reportingComponent": names.MANAGER,
        "reportingInstance": instance,
        "source": {"component": names.MANAGER},
    }
