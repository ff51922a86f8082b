"""What the kubelet and Prometheus ask: /healthz and /readyz on one port, /metrics on another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

from aiohttp import web

from tpmodel_operator.metrics import Metrics

Check = Callable[[], Sequence[str]]
"""Says what is wrong; nothing: all is well."""

Handler = Callable[[web.Request], Awaitable[web.Response]]


class Health:
    """This process's health. A standby that waits for the Lease is healthy and ready."""

    def __init__(self) -> None:
        self._alive: list[Check] = []
        self._ready: list[Check] = []

    def require_alive(self, check: Check) -> None:
        """What the check finds is healed by a restart of this process only."""
        self._alive.append(check)

    def require_ready(self, check: Check) -> None:
        """What the check finds will pass, or needs a person."""
        self._ready.append(check)

    def failures(self) -> list[str]:
        """Why this process should be restarted."""
        return [failure for check in self._alive for failure in check()]

    def hindrances(self) -> list[str]:
        """Why this process is not ready."""
        return [failure for check in (*self._alive, *self._ready) for failure in check()]


def finished(task: asyncio.Task[object]) -> Check:
    """A check that a task, which never ends by itself, has not ended."""
    return lambda: [f"{task.get_name()} has ended"] if task.done() else []


@asynccontextmanager
async def serving(health: Health, metrics: Metrics, *, health_port: int, metrics_port: int) -> AsyncIterator[None]:
    """Answers on all interfaces as long as the context lasts."""

    async def healthz(_: web.Request) -> web.Response:
        return _answer(health.failures())

    async def readyz(_: web.Request) -> web.Response:
        return _answer(health.hindrances())

    async def metrics_text(_: web.Request) -> web.Response:
        return web.Response(body=metrics.text(), headers={"Content-Type": metrics.content_type})

    async with AsyncExitStack() as stack:
        await stack.enter_async_context(_site(health_port, {"/healthz": healthz, "/readyz": readyz}))
        await stack.enter_async_context(_site(metrics_port, {"/metrics": metrics_text}))
        yield


@asynccontextmanager
async def _site(port: int, routes: dict[str, Handler]) -> AsyncIterator[None]:
    application = web.Application()
    application.add_routes([web.get(path, handler) for path, handler in routes.items()])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, port=port).start()
        yield
    finally:
        await runner.cleanup()


def _answer(failures: list[str]) -> web.Response:
    if failures:
        return web.Response(status=500, text="".join(f"{failure}\n" for failure in failures))
    return web.Response(text="ok\n")
