"""The control port: where supervisors present their pods to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import NoReturn, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from tpmodel.v1 import kv_pb2_grpc, weights_pb2_grpc, worker_pb2, worker_pb2_grpc
from tpmodel_worker import attempts
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.engine.errors import RebuildRefusedError
from tpmodel_worker.engine.kv_service import KV_SERVICE, KvService
from tpmodel_worker.engine.members import Members, OtherAttemptError, OtherModelError, RegistrationError
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.engine.weight_service import WEIGHT_SERVICE, WeightService
from tpmodel_worker.settings import ServeSettings

logger = logging.getLogger(__name__)

GANG_SERVICE = "tpmodel.v1.GangService"
_FOLLOW_SECONDS = 1.0
"""Followers hear of a new phase at once, of anything else this often."""
_OPTIONS = (
    # Supervisors find by keepalive that their leader's machine is gone, also while they say nothing.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
)


class Gang(Protocol):
    """What the service tells the engine."""

    def members_changed(self) -> None:
        """A registration brought something new."""
        ...

    def pod_drains(self, uid: str, name: str) -> None:
        """A pod of the gang got SIGTERM."""
        ...

    def rebuild(self, source: str, generation: int) -> tuple[bool, int]:
        """Another world is asked for; whether that is news, and the source's newest. Raises RebuildRefusedError."""
        ...

    def give_way(self, attempt: int) -> None:
        """The gang is at a higher attempt than this engine."""
        ...


class GangService(worker_pb2_grpc.GangServiceServicer):
    """Takes registrations and the news that a pod ends, and shows pods the engine's state."""

    def __init__(self, members: Members, status: EngineStatus, gang: Gang, *, attempt: int, model_path: str) -> None:
        """attempt, model_path: this engine's, for pods whose own differ."""
        self._members = members
        self._status = status
        self._gang = gang
        self._attempt = attempt
        self._model_path = model_path

    async def Register(  # noqa: N802
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        """Takes a pod's ranks; FAILED_PRECONDITION for another attempt, another checkpoint, ranks that can't be."""
        try:
            changed = self._members.register(request)
        except RegistrationError as error:
            await self._refuse(request, error, context)
        if changed:
            ranks = ", ".join(str(entry.rank) for entry in request.ranks) or "none"
            name = self._members.pod_name(request.pod_uid)
            logger.info("pod %s registered, ranks: %s", name, ranks, extra={"pod": request.pod_uid})
            self._gang.members_changed()
        return worker_pb2.RegisterResponse(instance_id=self._status.state.instance_id)

    async def Follow(  # noqa: N802
        self, request: worker_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.EngineState]:
        """The engine's state, until one side goes away."""
        changed, phase_changed = asyncio.Event(), asyncio.Event()
        sent = worker_pb2.EngineState()

        def note(state: worker_pb2.EngineState) -> None:
            changed.set()
            if (state.phase, state.leaving, state.parted_pods) != (sent.phase, sent.leaving, sent.parted_pods):
                phase_changed.set()

        stop_listening = self._status.listen(note)
        try:
            while True:
                changed.clear()
                phase_changed.clear()
                # A copy: the live state would change while it is being written.
                sent.CopyFrom(self._status.state)
                yield sent
                await changed.wait()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(phase_changed.wait(), _FOLLOW_SECONDS)
        finally:
            stop_listening()

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        """Begins the drain of the gang and returns at once."""
        # A pod of an older attempt, which finds the new leader under the same name, could never register.
        if not self._members.has_pod(request.pod_uid):
            message = f"pod {request.pod_uid} is not of this gang: it drains nothing"
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, message)
        name = self._members.pod_name(request.pod_uid)
        logger.info("pod %s drains", name, extra={"pod": request.pod_uid})
        self._gang.pod_drains(request.pod_uid, name)
        return worker_pb2.DrainResponse()

    async def Rebuild(  # noqa: N802
        self, request: worker_pb2.RebuildRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RebuildResponse:
        """Asks for the next epoch and returns at once."""
        if not request.source:
            await _abort(context, grpc.StatusCode.INVALID_ARGUMENT, "source: say who asks")
        epoch = self._status.state.epoch
        try:
            accepted, newest = self._gang.rebuild(request.source, request.generation)
        except RebuildRefusedError as error:
            await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return worker_pb2.RebuildResponse(accepted=accepted, generation=newest, epoch=epoch)

    async def _refuse(
        self, request: worker_pb2.RegisterRequest, error: RegistrationError, context: grpc.aio.ServicerContext
    ) -> NoReturn:
        """Says which of the two is outdated, so that whoever it is can end."""
        logger.warning("refused the registration of pod %s: %s", request.pod_name or request.pod_uid, error)
        metadata: tuple[tuple[str, str], ...] = ()
        if isinstance(error, OtherAttemptError):
            metadata = ((attempts.METADATA, str(self._attempt)),)
            if error.attempt > self._attempt:
                self._gang.give_way(error.attempt)
        elif isinstance(error, OtherModelError):
            metadata = ((attempts.MODEL_PATH_METADATA, self._model_path),)
        await _abort(context, grpc.StatusCode.FAILED_PRECONDITION, str(error), metadata)


async def start_control_server(
    settings: ServeSettings, service: GangService, weights: WeightService, kv: KvService
) -> tuple[grpc.aio.Server, int]:
    """Serves all services of the port, health and reflection; the server and its port.

    WeightService takes the trainer's token, health needs none, all others take the gang's.

    Raises RuntimeError when the port can't be had.
    """
    interceptor = TokenInterceptor(
        Expected.gang_token(settings.token),
        open_prefixes=("/grpc.health.v1.",),
        services={WEIGHT_SERVICE: Expected.trainer_token(settings.trainer_token_file)},
    )
    server = grpc.aio.server(interceptors=[interceptor], options=_OPTIONS)
    worker_pb2_grpc.add_GangServiceServicer_to_server(service, server)
    weights_pb2_grpc.add_WeightServiceServicer_to_server(weights, server)
    kv_pb2_grpc.add_KvServiceServicer_to_server(kv, server)
    servicer = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    for name in ("", GANG_SERVICE, WEIGHT_SERVICE, KV_SERVICE):
        await servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection(
        (GANG_SERVICE, WEIGHT_SERVICE, KV_SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME), server
    )
    bound = server.add_insecure_port(join_host_port(settings.address, settings.control_port))
    await server.start()
    return server, bound


async def _abort(
    context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str, metadata: tuple[tuple[str, str], ...] = ()
) -> NoReturn:
    await context.abort(code, message, metadata)
    raise AssertionError("abort always raises")
