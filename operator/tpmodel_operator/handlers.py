"""Everything about kopf: it brings the TPModels' events, and nothing else. No other file imports it.

Its high-level handlers are not used: they would put finalizers and annotations on TPModels, and call for single
changes where only the present state counts.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import kopf
from kubernetes.aio.client.configuration import Configuration

from tpmodel_operator.api import GROUP, PLURAL, VERSION
from tpmodel_operator.kube import PAGE, Json

Deliver = Callable[[Json, bool], None]
"""Takes a TPModel as the watch brought it, and whether it was deleted."""

LOGIN_SECONDS = 600
"""Credentials are read again this often: a service account's token is renewed within its file."""
LOGIN_PAUSE_SECONDS = 5.0
LONGEST_BACKOFF_SECONDS = 15


class Backoffs:
    """Pauses between tries of a request, without end: kopf's watch of TPModels would die of the last one."""

    def __iter__(self) -> Iterator[float]:
        pause = 1
        while True:
            yield pause
            pause = min(pause * 2, LONGEST_BACKOFF_SECONDS)


class NothingRemembered(kopf.DiffBaseStorage):
    """In place of kopf's memory of what it handled last, for which it copies every object that it sees."""

    def build(self, **_: Any) -> Any:
        """Nothing is compared."""
        return {}

    def fetch(self, **_: Any) -> None:
        """Nothing was stored."""

    def store(self, **_: Any) -> None:
        """Nothing is stored on TPModels."""


@dataclass(slots=True)
class ModelWatch:
    """kopf's operator, cut down to a watch of TPModels."""

    configuration: Configuration
    """The API server and how to log in there."""
    deliver: Deliver
    namespaces: tuple[str, ...]
    """Empty: all."""
    retake_signals: Callable[[], None]
    """Called when kopf has made the process's signals its own, which it cannot be kept from."""
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    started: asyncio.Event = field(default_factory=asyncio.Event)
    _login_at: float = -float("inf")

    async def run(self) -> None:
        """Watches until stop is set; kopf then ends every task that was begun after its own."""
        # It would tell of every event that it has handed over.
        logging.getLogger("kopf").setLevel(logging.WARNING)
        others = asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=self._registry(),
            settings=kopf_settings(),
            standalone=True,
            clusterwide=not self.namespaces,
            namespaces=self.namespaces,
            stop_flag=self.stop,
            ready_flag=self.started,
        )
        self.retake_signals()
        await kopf.run_tasks(tasks, ignored=others)

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()

        @kopf.on.login(registry=registry)
        async def login(**_: Any) -> kopf.ConnectionInfo:
            return await self._login()

        @kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)
        async def changed(event: Any, **_: Any) -> None:
            self.deliver(dict(event["object"]), event["type"] == "DELETED")

        return registry

    async def _login(self) -> kopf.ConnectionInfo:
        # A server that refuses everybody for a while must not be asked in a tight loop.
        await asyncio.sleep(max(0.0, self._login_at + LOGIN_PAUSE_SECONDS - time.monotonic()))
        self._login_at = time.monotonic()
        known = self.configuration
        header = await known.get_api_key_with_prefix("BearerToken", alias="authorization")
        scheme, _, token = (header or "").strip().rpartition(" ")
        return kopf.ConnectionInfo(
            server=known.host,
            ca_path=known.ssl_ca_cert,
            insecure=not known.verify_ssl,
            scheme=scheme or None,
            token=token or None,
            certificate_path=known.cert_file,
            private_key_path=known.key_file,
            proxy_url=known.proxy,
            # Also tells these credentials from equal ones that were refused once: kopf would never try those again.
            expiration=datetime.now(UTC) + timedelta(seconds=LOGIN_SECONDS),
        )


def kopf_settings() -> kopf.OperatorSettings:
    """As running kopf for long needs it."""
    settings = kopf.OperatorSettings()
    settings.watching.server_timeout = 240
    settings.watching.connect_timeout = 10
    settings.watching.chunk_size = PAGE
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.error_backoffs = Backoffs()
    settings.execution.default_backoff = 5
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.scanning.disabled = True
    settings.persistence.diffbase_storage = NothingRemembered()
    return settings
