"""The operator's view of the API (kube.Kube) over a dictionary: versions, UIDs, conflicts, preconditions and watches
behave as a real server's, as far as the operator uses them."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

from tpmodel_operator.kube import ApiError, Page, Resource, WatchEvent

Json = dict[str, Any]
Call = tuple[str, str, str]
"""Verb, plural and name."""


class FakeKube:
    """Objects by resource, namespace and name; every call is recorded."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], Json] = {}
        self.calls: list[Call] = []
        self.fail: Callable[[Call], ApiError | None] = lambda call: None
        """Set by a test: the error that a call meets."""
        self.oldest_watch = 0
        """Watches from an older version are told that it is gone."""
        self.page = 2
        self._version = itertools.count(1)
        self._uid = itertools.count(1)
        self._log: list[tuple[int, str, WatchEvent]] = []
        self._changed = asyncio.Event()
        self._cut = 0

    def made(self, verb: str, plural: str) -> list[str]:
        """Names in the calls of one kind, in order."""
        return [name for called, of, name in self.calls if (called, of) == (verb, plural)]

    def cut_watches(self) -> None:
        """Every watch that is open loses its connection."""
        self._cut += 1
        self._changed.set()

    # ------------------------------------------------------------------------------------------ as other clients

    def put(self, resource: Resource, body: Json) -> Json:
        """Somebody creates or changes an object."""
        key = (resource.plural, body["metadata"]["namespace"], body["metadata"]["name"])
        before = self.objects.get(key)
        new = copy.deepcopy(body)
        new["metadata"].setdefault("uid", before["metadata"]["uid"] if before else f"uid-{next(self._uid)}")
        new["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        self._store(key, new, "MODIFIED" if before else "ADDED")
        return copy.deepcopy(new)

    def remove(self, resource: Resource, namespace: str, name: str) -> None:
        """Somebody deletes an object, and it is gone."""
        gone = self.objects.pop((resource.plural, namespace, name))
        self._log_event(resource.plural, "DELETED", gone)

    # ------------------------------------------------------------------------------------------------ the calls

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        self._enter("get", resource, name)
        return copy.deepcopy(self._find(resource, namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        selector: str = "",
        page: int = 0,
        metadata_only: bool = False,
    ) -> AsyncIterator[Page]:
        self._enter("list", resource, "")
        found = [
            copy.deepcopy(item)
            for (plural, space, _), item in self.objects.items()
            if plural == resource.plural and namespace in (None, space)
        ]
        version = str(self._last_version())
        for start in range(0, max(len(found), 1), self.page):
            await asyncio.sleep(0)
            yield Page(found[start : start + self.page], version)

    async def watch(
        self, resource: Resource, namespace: str | None, *, resource_version: str, selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        self._enter("watch", resource, resource_version)
        if int(resource_version) < self.oldest_watch:
            raise ApiError(410, "Expired", "too old resource version")
        seen, cut = int(resource_version), self._cut
        while True:
            for version, plural, event in list(self._log):
                if version > seen and plural == resource.plural:
                    seen = version
                    yield event
            if self._cut != cut:
                raise ApiError(0, "ClientPayloadError", "connection lost")
            self._changed.clear()
            await self._changed.wait()

    async def create(self, resource: Resource, namespace: str, body: Json, *, dry_run: bool = False) -> Json:
        name = body["metadata"]["name"]
        self._enter("dry-run" if dry_run else "create", resource, name)
        if (resource.plural, namespace, name) in self.objects:
            raise ApiError(409, "AlreadyExists", name)
        return body if dry_run else self.put(resource, body)

    async def apply(self, resource: Resource, namespace: str, body: Json, *, subresource: str = "") -> Json:
        name = body["metadata"]["name"]
        self._enter(f"apply {subresource}".strip(), resource, name)
        before = self.objects.get((resource.plural, namespace, name))
        wanted = body["metadata"]
        if before is None and (subresource or "resourceVersion" in wanted):
            raise ApiError(404, "NotFound", name)
        if before is None:
            return self.put(resource, body)
        for field in ("resourceVersion", "uid"):
            if field in wanted and wanted[field] != before["metadata"][field]:
                raise ApiError(409, "Conflict", f"{name} has another {field}")
        changed = {"status": body["status"]} if subresource else body
        kept = before["metadata"] | ({} if subresource else wanted)
        return self.put(resource, before | changed | {"metadata": kept})

    async def replace(self, resource: Resource, namespace: str, body: Json) -> Json:
        name = body["metadata"]["name"]
        self._enter("replace", resource, name)
        before = self._find(resource, namespace, name)
        if body["metadata"].get("resourceVersion") != before["metadata"]["resourceVersion"]:
            raise ApiError(409, "Conflict", name)
        return self.put(resource, body | {"metadata": before["metadata"] | body["metadata"]})

    async def merge(self, resource: Resource, namespace: str, name: str, body: Json) -> Json:
        self._enter("merge", resource, name)
        return self.put(resource, self._find(resource, namespace, name) | body)

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace_seconds: int | None = None
    ) -> None:
        self._enter("delete", resource, name)
        if uid not in ("", self._find(resource, namespace, name)["metadata"]["uid"]):
            raise ApiError(409, "Conflict", f"{name} has another UID")
        self.remove(resource, namespace, name)

    async def discard(
        self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace_seconds: int | None = None
    ) -> bool:
        try:
            await self.delete(resource, namespace, name, uid=uid, grace_seconds=grace_seconds)
        except ApiError as error:
            if error.not_found or error.conflict:
                return False
            raise
        return True

    def _enter(self, verb: str, resource: Resource, name: str) -> None:
        call = (verb, resource.plural, name)
        self.calls.append(call)
        if (error := self.fail(call)) is not None:
            raise error

    def _find(self, resource: Resource, namespace: str | None, name: str) -> Json:
        found = self.objects.get((resource.plural, namespace or "", name))
        if found is None:
            raise ApiError(404, "NotFound", name)
        return found

    def _store(self, key: tuple[str, str, str], item: Json, event: Any) -> None:
        item["metadata"]["resourceVersion"] = str(next(self._version))
        self.objects[key] = item
        self._log_event(key[0], event, item)

    def _log_event(self, plural: str, kind: Any, item: Json) -> None:
        if kind == "DELETED":
            item["metadata"]["resourceVersion"] = str(next(self._version))
        self._log.append((int(item["metadata"]["resourceVersion"]), plural, WatchEvent(kind, copy.deepcopy(item))))
        self._changed.set()

    def _last_version(self) -> int:
        return max((version for version, _, _ in self._log), default=0)
