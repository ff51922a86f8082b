"""An api process at work: gRPC and HTTP towards clients, one Unix socket towards the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn

from tpmodel_worker.api.engine_link import EngineLink
from tpmodel_worker.api.grpc_service import make_grpc_server
from tpmodel_worker.api.http_app import HttpApi
from tpmodel_worker.api.metrics import ApiMetrics
from tpmodel_worker.api.model import ServedModel
from tpmodel_worker.api.report import report_listening
from tpmodel_worker.api.tls import ServerCertificate
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

_LISTEN_BACKLOG = 1024
_LAME_DUCK_SECONDS = 0.3


class _HttpServer(uvicorn.Server):
    """uvicorn without its own signal handling: this process has two servers to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(model: ServedModel, name: str) -> None:
    """Serves until SIGTERM or SIGINT, then finishes running streams within settings.drain_timeout.

    Args:
        model: what is served, and the settings.
        name: of this process, as the supervisor knows it.

    Raises:
        OSError: the HTTP address cannot be bound.
        RuntimeError: the gRPC address cannot be bound.
    """
    settings = model.settings
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)

    link, metrics, certificate = EngineLink(settings.front_socket), ApiMetrics(), model.certificate
    grpc_server = make_grpc_server(model, link, metrics, certificate)
    listener = _listen(settings.host, settings.http_port)
    http_server = _make_http_server(HttpApi(model, link, metrics), settings, certificate)
    await grpc_server.start()
    logger.info("gRPC on %s:%d, HTTP on %s:%d", settings.host, settings.port, settings.host, settings.http_port)
    async with asyncio.TaskGroup() as group:
        http = group.create_task(http_server.serve(sockets=[listener]))
        helpers = [
            group.create_task(link.run()),
            group.create_task(report_listening(settings.report_socket, name)),
        ]
        if certificate is not None:
            helpers.append(group.create_task(certificate.renew()))
        await stopping.wait()
        logger.info("stopping; running streams have %.0f s", settings.drain_timeout)
        link.close_to_new_requests()
        # A call that meets a stopping gRPC server ends as CANCELLED, which clients do not retry. So calls are
        # refused as UNAVAILABLE until health checks and connections in the making have caught up.
        await asyncio.sleep(_LAME_DUCK_SECONDS)
        http_server.should_exit = True
        await asyncio.gather(http, grpc_server.stop(settings.drain_timeout))
        for helper in helpers:
            helper.cancel()


def _make_http_server(api: HttpApi, settings: ServeSettings, certificate: ServerCertificate | None) -> _HttpServer:
    config = uvicorn.Config(
        api.app(),
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
    )
    if certificate is not None:
        config.load()
        # uvicorn would read the files once.
        config.ssl = certificate.context
    return _HttpServer(config)


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket whose port the pod's other api processes share."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    listener.listen(_LISTEN_BACKLOG)
    listener.setblocking(False)
    return listener
