"""The control port: where supervisors present their pods to the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import TokenInterceptor
from tpmodel_worker.engine.members import Members, RegistrationError

logger = logging.getLogger(__name__)

GANG_SERVICE = "tpmodel.v1.GangService"


class GangService(worker_pb2_grpc.GangServiceServicer):
    """Takes registrations and the news that a pod ends."""

    def __init__(
        self, instance_id: str, members: Members, on_change: Callable[[], None], on_drain: Callable[[], None]
    ) -> None:
        """on_change: a registration brought something new; on_drain: a pod got SIGTERM."""
        self._instance_id = instance_id
        self._members = members
        self._on_change = on_change
        self._on_drain = on_drain

    async def Register(  # noqa: N802
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        """Takes a pod's ranks; FAILED_PRECONDITION for another attempt, or ranks that can't be."""
        try:
            changed = self._members.register(request)
        except RegistrationError as error:
            logger.warning("refused the registration of pod %s: %s", request.pod_uid, error)
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        if changed:
            ranks = ", ".join(str(entry.rank) for entry in request.ranks) or "none"
            logger.info("pod %s registered, ranks: %s", request.pod_uid, ranks, extra={"pod": request.pod_uid})
            self._on_change()
        return worker_pb2.RegisterResponse(instance_id=self._instance_id)

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        """Begins the drain of the gang and returns at once."""
        logger.info("pod %s drains", request.pod_uid, extra={"pod": request.pod_uid})
        self._on_drain()
        return worker_pb2.DrainResponse()


async def start_control_server(
    address: str, port: int, token: str, service: GangService
) -> tuple[grpc.aio.Server, int]:
    """Serves GangService, health and reflection; the server and its port. Health alone needs no token.

    Raises RuntimeError when the port can't be had.
    """
    server = grpc.aio.server(interceptors=[TokenInterceptor(token, open_prefixes=("/grpc.health.v1.",))])
    worker_pb2_grpc.add_GangServiceServicer_to_server(service, server)
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", GANG_SERVICE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((GANG_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server)
    bound = server.add_insecure_port(f"{address}:{port}")
    await server.start()
    return server, bound


async def _abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str) -> NoReturn:
    await context.abort(code, message)
    raise AssertionError("abort always raises")
