"""List and watch of one kind of object in one namespace, or in all: keeps a Store current and tells what changed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Generic, NoReturn, Protocol

from tpmodel_operator import names, records
from tpmodel_operator.kube import ApiError, Json, Page, Resource, WatchEvent
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.queue import Key
from tpmodel_operator.store import Entry, R, Store

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
LONGEST_BACKOFF_SECONDS = 15.0


class WatchCalls(Protocol):
    """The part of Kube that a watch needs."""

    def list(self, resource: Resource, namespace: str | None, *, selector: str = "") -> AsyncIterator[Page]:
        """All objects, page by page."""
        ...

    def watch(
        self, resource: Resource, namespace: str | None, *, resource_version: str, selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Changes after the version."""
        ...


class Watch(Generic[R]):
    """Keeps a Store as the API server has it, whatever happens to the connection."""

    def __init__(
        self,
        kube: WatchCalls,
        resource: Resource,
        namespace: str | None,
        *,
        parse: Callable[[Json], R | None],
        store: Store[R],
        changed: Callable[[Key, float | None], None],
        metrics: Metrics,
        alarming: Callable[[R | None, R | None], bool] = lambda before, after: False,
    ) -> None:
        """Begins nothing yet.

        Args:
            kube: the API server.
            resource: what is watched.
            namespace: where; None: in all.
            parse: makes a record of an object; None where it is of no gang.
            store: is kept current.
            changed: called with a TPModel that something changed for, and the time (monotonic) when an alarming event
                arrived, else None.
            metrics: count the fresh lists.
            alarming: whether a change, from one record to the next, may be a fault; None: there is no such object.
        """
        self.resource = resource
        self.namespace = namespace
        self.synced = asyncio.Event()
        """Set once the first list is in."""
        self._kube = kube
        self._parse = parse
        self._store = store
        self._changed = changed
        self._alarming = alarming
        self._metrics = metrics

    async def run(self) -> NoReturn:
        """Lists and watches for ever. A watch that fails is followed by a fresh list."""
        failures = 0
        while True:
            begun = time.monotonic()
            try:
                version = await self._list()
                while True:
                    version = await self._follow(version)
            except ApiError as error:
                # What worked for a while is not a failure in a row; a version that the server forgot is none at all.
                lasted = time.monotonic() - begun > LONGEST_BACKOFF_SECONDS
                failures = 0 if error.gone else 1 if lasted else failures + 1
                logger.log(logging.INFO if error.gone else logging.WARNING, "watch of %s: %s", self, error)
            self._metrics.watch_restarts.labels(self.resource.plural).inc()
            if failures:
                await asyncio.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** (failures - 1), LONGEST_BACKOFF_SECONDS))

    def __str__(self) -> str:
        return f"{self.resource.plural} in {self.namespace or 'all namespaces'}"

    async def _list(self) -> str:
        seen: set[str] = set()
        version = ""
        async for page in self._kube.list(self.resource, self.namespace, selector=names.WATCH_SELECTOR):
            version = page.resource_version
            for item in page.items:
                seen.add(self._put(item))
        for uid in self._store.uids(self.namespace) - seen:
            self._remove(uid)
        self.synced.set()
        return version

    async def _follow(self, version: str) -> str:
        """Until the watch ends; returns the version to go on from."""
        events = self._kube.watch(
            self.resource, self.namespace, resource_version=version, selector=names.WATCH_SELECTOR
        )
        async for event in events:
            version = event.object["metadata"]["resourceVersion"]
            if event.type in ("ADDED", "MODIFIED"):
                self._put(event.object)
            elif event.type == "DELETED":
                self._remove(event.object["metadata"]["uid"])
        return version

    def _put(self, item: Json) -> str:
        metadata = item["metadata"]
        uid = metadata["uid"]
        before = self._store.get(uid)
        entry = Entry(records.version(item), metadata["namespace"], self._parse(item))
        self._tell(self._store.put(uid, entry), before, entry.record)
        return uid

    def _remove(self, uid: str) -> None:
        before = self._store.get(uid)
        self._tell(self._store.remove(uid), before, None)

    def _tell(self, key: Key | None, before: R | None, after: R | None) -> None:
        if key is not None:
            self._changed(key, time.monotonic() if self._alarming(before, after) else None)
