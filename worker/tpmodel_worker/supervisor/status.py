"""The health port: gRPC health, GangStatus and reflection; plaintext, no token, read-only, no prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.processes import Process

READY_SERVICE = "tpmodel.v1.Ready"
_STATUS_SERVICE = worker_pb2.DESCRIPTOR.services_by_name["StatusService"].full_name


def process_statuses(processes: Iterable[Process]) -> list[worker_pb2.ProcessStatus]:
    """The processes as GangStatus and GetSupervisorStatus show them."""
    return [
        worker_pb2.ProcessStatus(
            name=process.name,
            pid=process.pid,
            state=process.state,
            restarts=process.restarts,
            port=process.port,
            device_bytes=process.device_bytes,
        )
        for process in processes
    ]


class StatusServicer(worker_pb2_grpc.StatusServiceServicer):
    """Answers GangStatus."""

    def __init__(self, status: Callable[[], worker_pb2.GangStatusResponse]) -> None:
        self._status = status

    async def GangStatus(  # noqa: N802 - the name is the proto's
        self, request: worker_pb2.GangStatusRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.GangStatusResponse:
        """What the supervisor knows of the gang now."""
        return self._status()


class HealthPort:
    """The server behind Kubernetes' probes and `tpmodel status`; serves from before the download to the end."""

    def __init__(self, settings: ServeSettings) -> None:
        self._status: Callable[[], worker_pb2.GangStatusResponse] = worker_pb2.GangStatusResponse
        self._health = HealthServicer()
        self._server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        worker_pb2_grpc.add_StatusServiceServicer_to_server(StatusServicer(self._answer), self._server)
        reflection.enable_server_reflection(
            (_STATUS_SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self._server,
        )
        self._server.add_insecure_port(join_host_port(settings.host, settings.health_port))

    async def start(self) -> None:
        """Starts serving: alive, not ready."""
        # "" says that the supervisor's loop turns, which answering says already.
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)
        await self._server.start()

    def show(self, status: Callable[[], worker_pb2.GangStatusResponse]) -> None:
        """What GangStatus answers from now on."""
        self._status = status

    def _answer(self) -> worker_pb2.GangStatusResponse:
        return self._status()

    async def set_ready(self, ready: bool) -> None:
        """What tpmodel.v1.Ready answers from now on."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(READY_SERVICE, status.SERVING if ready else status.NOT_SERVING)

    async def stop(self) -> None:
        """Stops serving at once."""
        await self._server.stop(0)
