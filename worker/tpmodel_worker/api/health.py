"""grpc.health.v1 for clients, following the engine's phase at once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tpmodel_worker.api.engine_link import EngineLink

INFERENCE_SERVICE = "tpmodel.v1.InferenceService"
_Response = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):
    """Answers for "" and the inference service: SERVING while requests should come here."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    async def Check(  # noqa: N802 - the method's name in the protocol
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """The state now; NOT_FOUND for another service."""
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return _Response(status=status)

    async def Watch(  # noqa: N802 - the method's name in the protocol
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """The state now and at every change, until this process stops accepting requests."""
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                yield _Response(status=status)
            if self._link.closing:
                return
            last = status
            if self._status(request.service) == status:
                await self._link.wait_for_change()

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in ("", INFERENCE_SERVICE):
            return _Response.SERVICE_UNKNOWN
        return _Response.SERVING if self._link.serving else _Response.NOT_SERVING
