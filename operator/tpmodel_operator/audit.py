"""Whether the watches still tell the truth: what they hold is compared with fresh lists.

A watch can end without a trace, or hang, and the operator would look healthy and do nothing. An object counts
against it when two lists, a minute apart, both say that the watch has missed the same thing; a quiet cluster has no
such object.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

from tpmodel_operator import records
from tpmodel_operator.kube import ApiError, Page, Resource
from tpmodel_operator.metrics import Metrics

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0

GONE = -1
"""In place of a version: the object exists no more."""


class ListCalls(Protocol):
    """The part of Kube that an audit needs."""

    def list(
        self, resource: Resource, namespace: str | None, *, selector: str = "", metadata_only: bool = False
    ) -> AsyncIterator[Page]:
        """All objects, page by page."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Audited:
    """One kind of object that watches keep current."""

    resource: Resource
    namespaces: Sequence[str | None]
    selector: str
    held: Callable[[], Mapping[str, int]]
    """The version held of each object, by UID."""


def missed(listed: Mapping[str, int], list_version: int, held: Mapping[str, int]) -> dict[str, int]:
    """By UID: the version that a watch should have brought by now, or GONE."""
    behind = {uid: version for uid, version in listed.items() if held.get(uid, GONE) < version}
    # What is newer than the list may well not be in it.
    over = {uid: GONE for uid, version in held.items() if uid not in listed and version <= list_version}
    return behind | over


def overdue(before: Mapping[str, int], now: Mapping[str, int], held: Mapping[str, int]) -> list[str]:
    """UIDs of what was missed at the audit before and has still not been brought."""
    return [
        uid
        for uid, version in before.items()
        # An object that came or went in between is in one of the two only.
        if uid in now and (held.get(uid, GONE) < version if version != GONE else now[uid] == GONE and uid in held)
    ]


class Audit:
    """Lists and compares, for ever."""

    def __init__(self, kube: ListCalls, audited: Sequence[Audited], *, period: float, metrics: Metrics) -> None:
        self._kube = kube
        self._audited = audited
        self._period = period
        self._metrics = metrics
        self._missed: dict[str, dict[str, int]] = {}
        self._overdue: dict[str, list[str]] = {}

    @property
    def failures(self) -> list[str]:
        """What is wrong with the watches; empty: nothing."""
        return [f"{len(uids)} {plural} are not as the watch says" for plural, uids in self._overdue.items() if uids]

    async def run(self) -> NoReturn:
        """Audits each period; where something was missed, again after PATIENCE_SECONDS."""
        while True:
            suspicious = any(self._missed.values()) or any(self._overdue.values())
            await asyncio.sleep(min(PATIENCE_SECONDS, self._period) if suspicious else self._period)
            await self.audit()

    async def audit(self) -> None:
        """One audit of everything. A list that fails proves nothing."""
        for audited in self._audited:
            try:
                await self._compare(audited)
            except ApiError as error:
                logger.warning("audit of %s: %s", audited.resource.plural, error)
        self._metrics.differences.set(sum(len(uids) for uids in self._overdue.values()))

    async def _compare(self, audited: Audited) -> None:
        listed: dict[str, int] = {}
        oldest = 0
        for namespace in audited.namespaces:
            pages = self._kube.list(audited.resource, namespace, selector=audited.selector, metadata_only=True)
            async for page in pages:
                listed |= {item["metadata"]["uid"]: records.version(item) for item in page.items}
                version = int(page.resource_version)
                oldest = min(oldest or version, version)
        held = audited.held()
        plural = audited.resource.plural
        now = missed(listed, oldest, held)
        self._overdue[plural] = overdue(self._missed.get(plural, {}), now, held)
        self._missed[plural] = now
        if self._overdue[plural]:
            logger.error("the watch of %s has missed changes of %s", plural, self._overdue[plural][:10])
