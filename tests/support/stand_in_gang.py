"""The stand-in engine's GangService; apart, since forked stand-ins import no gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from support.stand_ins import note
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.settings import ServeSettings


class _GangService(worker_pb2_grpc.GangServiceServicer):
    def __init__(self, instance: str, registered: list[worker_pb2.RegisterRequest]) -> None:
        self._instance = instance
        self._registered = registered

    async def Register(  # noqa: N802
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        note(
            what="register",
            seen=request.instance_id_seen,
            supervisor_port=request.supervisor_port,
            rendezvous=request.rendezvous,
            ranks={entry.rank: entry.pid for entry in request.ranks},
            ports=[entry.port for entry in sorted(request.ranks, key=lambda entry: entry.rank)],
        )
        self._registered.append(request)
        return worker_pb2.RegisterResponse(instance_id=self._instance)

    async def Follow(  # noqa: N802
        self, request: worker_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.EngineState]:
        yield worker_pb2.EngineState(instance_id=self._instance)
        await asyncio.Event().wait()

    async def Rebuild(  # noqa: N802
        self, request: worker_pb2.RebuildRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RebuildResponse:
        return worker_pb2.RebuildResponse(accepted=True)

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "drains come over the report socket")
        raise AssertionError("abort always raises")


async def serve_gang(
    settings: ServeSettings, instance: str, registered: list[worker_pb2.RegisterRequest]
) -> grpc.aio.Server:
    """Serves it on the control port."""
    server = grpc.aio.server(interceptors=[TokenInterceptor(Expected.gang_token(settings.token))])
    worker_pb2_grpc.add_GangServiceServicer_to_server(_GangService(instance, registered), server)
    server.add_insecure_port(f"{settings.address}:{settings.control_port}")
    await server.start()
    return server
