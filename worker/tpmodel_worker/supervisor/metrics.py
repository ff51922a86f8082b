"""The metrics port: what all processes of the pod count, as Prometheus reads it."""

from __future__ import annotations

import asyncio
import http
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from tpmodel_worker.supervisor.processes import Process

_REQUEST_SECONDS = 10.0
_MAX_HEADER_BYTES = 16 * 1024


class ProcessCollector(Collector):
    """The supervisor's own metrics: which processes live, and how often each was started again."""

    def __init__(self, processes: Callable[[], Iterable[Process]]) -> None:
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        """Called for every scrape."""
        up = GaugeMetricFamily("tpmodel_process_up", "1 while the process lives.", labels=["process"])
        restarts = GaugeMetricFamily(
            "tpmodel_process_restarts", "How often the process was started again.", labels=["process"]
        )
        for process in self._processes():
            up.add_metric([process.name], float(process.alive))
            restarts.add_metric([process.name], process.restarts)
        yield up
        yield restarts


class MetricsServer:
    """A small HTTP/1.1 server for GET /metrics; one request on a connection."""

    def __init__(self, host: str, port: int, folder: Path, processes: Callable[[], Iterable[Process]]) -> None:
        """folder: where the pod's processes keep prometheus_client's shared files."""
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._registry = CollectorRegistry()
        MultiProcessCollector(self._registry, path=str(folder))
        self._registry.register(ProcessCollector(processes))

    async def start(self) -> None:
        """Listens. Raises OSError when the port cannot be had."""
        self._server = await asyncio.start_server(
            self._serve_connection, self._host, self._port, reuse_port=True, limit=_MAX_HEADER_BYTES
        )

    async def stop(self) -> None:
        """Stops listening."""
        if self._server is not None:
            self._server.close()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.partition(b" ")
                target = rest.partition(b" ")[0].partition(b"?")[0]
                writer.write(await self._respond(method, target))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, TimeoutError):
            pass  # a client that sent no request, or left: nothing to answer
        finally:
            writer.close()

    async def _respond(self, method: bytes, target: bytes) -> bytes:
        if target != b"/metrics":
            return _response(http.HTTPStatus.NOT_FOUND, b"see /metrics\n")
        if method != b"GET":
            return _response(http.HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        # Reads a file for every process: off the event loop.
        body = await asyncio.to_thread(generate_latest, self._registry)
        return _response(http.HTTPStatus.OK, body, CONTENT_TYPE_LATEST)


def _response(status: http.HTTPStatus, body: bytes, content_type: str = "text/plain") -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
