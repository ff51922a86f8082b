"""The Kubernetes API as the operator uses it: a few typed calls over raw JSON.

Connections, TLS and credentials come from kubernetes.aio; its thousand model classes are left alone, since decoding
into them costs time and memory for every object seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from tpmodel_operator import api, names
from tpmodel_operator.metrics import Metrics

Json = dict[str, Any]
EventType = Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]

PAGE = 250
"""Objects of one page of a list: a page is decoded as a whole, which takes about ten times its size."""
REQUEST_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=10)
WATCH_SECONDS = 240
"""A watch is asked for anew this often, at the latest."""
WATCH_SILENCE_SECONDS = 90
"""The server sends a bookmark each minute: a watch that is silent for longer has a dead connection."""

_JSON = "application/json"
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"
_APPLY_PATCH = "application/apply-patch+yaml"
_MERGE_PATCH = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Resource:
    """One kind of object, and where the API serves it."""

    api_version: str
    kind: str
    plural: str

    def path(self, namespace: str | None = None, name: str = "", subresource: str = "") -> str:
        """URL path of a collection (no namespace: of all namespaces), an object or its subresource."""
        parts = ["apis" if "/" in self.api_version else "api", *self.api_version.split("/")]
        parts += ["namespaces", namespace] if namespace else []
        parts += [part for part in (self.plural, name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


PODS = Resource("v1", "Pod", "pods")
NODES = Resource("v1", "Node", "nodes")
SECRETS = Resource("v1", "Secret", "secrets")
CONFIG_MAPS = Resource("v1", "ConfigMap", "configmaps")
SERVICES = Resource("v1", "Service", "services")
SERVICE_ACCOUNTS = Resource("v1", "ServiceAccount", "serviceaccounts")
CLAIMS = Resource("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
EVENTS = Resource("v1", "Event", "events")
STATEFUL_SETS = Resource("apps/v1", "StatefulSet", "statefulsets")
NETWORK_POLICIES = Resource("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
DISRUPTION_BUDGETS = Resource("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")
LEASES = Resource("coordination.k8s.io/v1", "Lease", "leases")
MODELS = Resource(f"{api.GROUP}/{api.VERSION}", api.KIND, api.PLURAL)


class ApiError(Exception):
    """A call failed; status is the HTTP status, 0 where no answer came."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}" if status else f"{reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message

    @property
    def not_found(self) -> bool:
        """The object does not exist."""
        return self.status == 404

    @property
    def conflict(self) -> bool:
        """It exists already, or is another one or another version than the call was meant for."""
        return self.status == 409

    @property
    def forbidden(self) -> bool:
        """This account may not do it."""
        return self.status == 403

    @property
    def gone(self) -> bool:
        """The resource version asked for is no longer known."""
        return self.status == 410

    @property
    def namespace_ends(self) -> bool:
        """Refused since the namespace is being deleted."""
        return self.status == 403 and "being terminated" in self.message


@dataclass(frozen=True, slots=True)
class Page:
    """Part of a list."""

    items: list[Json]
    resource_version: str
    remaining: int = 0
    """Objects on later pages, where the list is of a whole namespace."""


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One line of a watch."""

    type: EventType
    object: Json


class Kube:
    """Calls of the API. Every failure is an ApiError."""

    def __init__(self, configuration: Configuration, metrics: Metrics) -> None:
        self.configuration = configuration
        self._client = ApiClient(configuration)
        self._metrics = metrics

    @classmethod
    async def connect(cls, metrics: Metrics) -> Self:
        """With $KUBECONFIG where it is set, else with the pod's service account, else with ~/.kube/config."""
        return cls(await load_configuration(), metrics)

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()

    async def get(self, resource: Resource, namespace: str | None, name: str) -> Json:
        """One object."""
        return await self._call("GET", resource.path(namespace, name))

    async def list(
        self,
        resource: Resource,
        namespace: str | None,
        *,
        selector: str = "",
        page: int = PAGE,
        metadata_only: bool = False,
    ) -> AsyncIterator[Page]:
        """All objects, as they are now, page by page: whoever keeps only records never holds all of them."""
        accept = _METADATA_ONLY if metadata_only else _JSON
        token = ""
        while True:
            query = {"limit": str(page), "labelSelector": selector, "continue": token}
            body = await self._call("GET", resource.path(namespace), query=query, accept=accept)
            metadata = body["metadata"]
            token = metadata.get("continue", "")
            # The API server writes null for no items where only metadata is asked for.
            yield Page(body["items"] or [], metadata["resourceVersion"], metadata.get("remainingItemCount", 0))
            if not token:
                return

    async def watch(
        self, resource: Resource, namespace: str | None, *, resource_version: str, selector: str = ""
    ) -> AsyncIterator[WatchEvent]:
        """Changes after the version; ends when the server ends the watch, which is no error."""
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "labelSelector": selector,
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        timeout = aiohttp.ClientTimeout(sock_connect=10, sock_read=WATCH_SILENCE_SECONDS)
        async with self._send("GET", resource.path(namespace), query=query, timeout=timeout) as response:
            async for line in _lines(response.content):
                yield _watch_event(json.loads(line))

    async def apply(self, resource: Resource, namespace: str, body: Json, *, subresource: str = "") -> Json:
        """Server-side apply: fields of the body are ours, fields that we no longer name go."""
        path = resource.path(namespace, body["metadata"]["name"], subresource)
        query = {"fieldManager": names.MANAGER, "force": "true"}
        return await self._call("PATCH", path, query=query, body=body, content_type=_APPLY_PATCH)

    async def create(self, resource: Resource, namespace: str, body: Json, *, dry_run: bool = False) -> Json:
        """A new object; a conflict where it exists already. A dry run tells that without making it."""
        query = {"fieldManager": names.MANAGER} | ({"dryRun": "All"} if dry_run else {})
        return await self._call("POST", resource.path(namespace), query=query, body=body)

    async def replace(self, resource: Resource, namespace: str, body: Json) -> Json:
        """The whole object; a conflict where it is no longer of the body's resourceVersion."""
        return await self._call("PUT", resource.path(namespace, body["metadata"]["name"]), body=body)

    async def merge(self, resource: Resource, namespace: str, name: str, body: Json, *, subresource: str = "") -> Json:
        """JSON merge patch."""
        path = resource.path(namespace, name, subresource)
        return await self._call("PATCH", path, body=body, content_type=_MERGE_PATCH)

    async def delete(
        self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace_seconds: int | None = None
    ) -> None:
        """Begins the deletion; a conflict where the object has another UID than the one named."""
        options: Json = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        if grace_seconds is not None:
            options["gracePeriodSeconds"] = grace_seconds
        await self._call("DELETE", resource.path(namespace, name), body=options)

    async def discard(
        self, resource: Resource, namespace: str, name: str, *, uid: str = "", grace_seconds: int | None = None
    ) -> bool:
        """As delete, but already gone, or gone and made again under its name, is as wanted: False."""
        try:
            await self.delete(resource, namespace, name, uid=uid, grace_seconds=grace_seconds)
        except ApiError as error:
            if error.not_found or error.conflict:
                return False
            raise
        return True

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> Json:
        async with self._send(
            method, path, query=query, body=body, content_type=content_type, accept=accept
        ) as response:
            return json.loads(await response.read())

    @asynccontextmanager
    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        timeout: aiohttp.ClientTimeout = REQUEST_TIMEOUT,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": names.MANAGER}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        parameters = urlencode({key: value for key, value in (query or {}).items() if value})
        url = f"{self.configuration.host}{path}" + (f"?{parameters}" if parameters else "")
        status = 0
        try:
            answer = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=timeout
            )
            async with answer.response as response:
                status = response.status
                if status >= 400:
                    raise _refusal(status, response.reason or "", await response.read())
                yield response
        except (aiohttp.ClientError, OSError, ValueError) as error:  # TimeoutError is an OSError
            raise ApiError(0, type(error).__name__, str(error)) from error
        finally:
            self._metrics.api_requests.labels(method, str(status)).inc()


async def load_configuration() -> Configuration:
    """Address and credentials of the API server, by the rules of Kube.connect."""
    configuration = Configuration()
    if "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
        load_incluster_config(configuration)
    else:
        await load_kube_config(os.environ.get("KUBECONFIG"), client_configuration=configuration, persist_config=False)
    configuration.proxy = configuration.proxy or _proxy_of(configuration.host)
    # Else aiohttp looks for a password in ~/.netrc, in another thread, before each request.
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration


def _proxy_of(server: str) -> str | None:
    """By the usual environment variables."""
    parts = urlsplit(server)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)


async def _lines(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of any length (readline has a limit)."""
    rest = b""
    async for chunk in content.iter_any():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line


def _watch_event(line: Json) -> WatchEvent:
    if line["type"] == "ERROR":
        status = line["object"]
        raise ApiError(int(status.get("code", 0)), str(status.get("reason", "")), str(status.get("message", "")))
    return WatchEvent(line["type"], line["object"])


def _refusal(status: int, reason: str, body: bytes) -> ApiError:
    """What the server answered, which is a Status object unless a proxy answered instead."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = {"message": body[:200].decode(errors="replace").strip()}
    return ApiError(status, str(answer.get("reason") or reason), str(answer.get("message", "")))
