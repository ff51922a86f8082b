"""Presents this pod and its ranks to the engine, again whenever something may have changed, and follows its state."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker import attempts
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.leader_lookup import Leader
from tpmodel_worker.supervisor.lifecycle import Ending

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_CALL_SECONDS = 2.0
# A connection that goes idle would look like one that broke.
_NEVER_IDLE_MILLISECONDS = 2**31 - 1
_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.client_idle_timeout_ms", _NEVER_IDLE_MILLISECONDS),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    # The leader's machine may vanish without a word.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


class Registration:
    """The supervisor's client of the engine's GangService."""

    def __init__(
        self,
        leader: Leader,
        settings: ServeSettings,
        *,
        request: Callable[[], worker_pb2.RegisterRequest | None],
        on_state: Callable[[worker_pb2.EngineState], None],
        on_change: Callable[[], None],
        end_pod: Callable[[Ending], None],
    ) -> None:
        """Args:
        leader: where the engine is.
        settings: of this pod.
        request: what to say now; None where it is too early.
        on_state: told the state of the engine that the pod is registered with, whenever it changes.
        on_change: called when the pod has been registered, or is not any more.
        end_pod: called when this pod can never be part of the gang.
        """
        self._leader = leader
        self._settings = settings
        self._metadata = token_metadata(settings.token)
        self._request = request
        self._on_state = on_state
        self._on_change = on_change
        self._end_pod = end_pod
        self._changed = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._stub: worker_pb2_grpc.GangServiceAsyncStub | None = None
        self._instance_id = ""
        self._last_refusal = ""
        self.leader_address = ""
        """Of the engine that the pod is, or was last, registered with."""

    @property
    def registered(self) -> bool:
        """Whether the engine knows this pod, as far as the connection to it tells."""
        return self._stub is not None

    async def instance_id(self) -> str:
        """The engine instance that the pod is registered with, "" before.

        Where a call is under way its end is awaited: the engine may speak to a rank, which asks here, before its
        own answer has arrived.
        """
        await self._quiet.wait()
        return self._instance_id

    def changed(self) -> None:
        """Has the pod registered again, with what is true now."""
        self._changed.set()

    async def run(self) -> None:
        """Registers, then again on every change and whenever the connection breaks, until cancelled."""
        while True:
            await self._until_there_is_something_to_say()
            address = await self._leader.find()
            target = join_host_port(address, self._settings.control_port)
            async with grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS) as channel:
                stub = worker_pb2_grpc.GangServiceStub(channel)
                if await self._register(stub):
                    self.leader_address = address
                    await self._stay(stub, address)
            await asyncio.sleep(_RETRY_SECONDS)

    async def drain(self) -> bool:
        """Tells the engine that this pod is to end; False where it cannot be told."""
        if self._stub is None:
            return False
        request = worker_pb2.DrainRequest(pod_uid=self._settings.pod_uid)
        try:
            await self._stub.Drain(request, timeout=_CALL_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            _log.warning("the leader could not be told of the drain: %s: %s", error.code().name, error.details())
            return False
        return True

    async def _until_there_is_something_to_say(self) -> None:
        while True:
            self._changed.clear()
            if self._request() is not None:
                return
            await self._changed.wait()

    async def _stay(self, stub: worker_pb2_grpc.GangServiceAsyncStub, address: str) -> None:
        """Follows the engine's state and repeats what changes, until the engine is gone or the leader has moved."""
        self._stub = stub
        self._on_change()
        ends = {asyncio.create_task(self._follow(stub)), asyncio.create_task(self._leader.moved_from(address))}
        try:
            while not any(end.done() for end in ends):
                changed = asyncio.create_task(self._changed.wait())
                await asyncio.wait({*ends, changed}, return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if self._changed.is_set() and not await self._register(stub):
                    return
        finally:
            for end in ends:
                end.cancel()
            self._stub = None
            self._on_change()

    async def _register(self, stub: worker_pb2_grpc.GangServiceAsyncStub) -> bool:
        self._changed.clear()
        request = self._request()
        if request is None:
            return True  # a rank is being replaced: it will be said when the new one is there
        request.instance_id_seen = self._instance_id
        self._quiet.clear()
        try:
            response = await stub.Register(request, timeout=_CALL_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            self._note_refusal(error)
            return False
        finally:
            self._quiet.set()
        if response.instance_id != self._instance_id:
            _log.info("registered with engine instance %s", response.instance_id)
        self._instance_id = response.instance_id
        self._last_refusal = ""
        return True

    async def _follow(self, stub: worker_pb2_grpc.GangServiceAsyncStub) -> None:
        request = worker_pb2.FollowRequest(pod_uid=self._settings.pod_uid)
        try:
            async for state in stub.Follow(request, metadata=self._metadata):
                self._on_state(state)
        except grpc.aio.AioRpcError as error:
            _log.info("the connection to the engine ended: %s: %s", error.code().name, error.details())

    def _note_refusal(self, error: grpc.aio.AioRpcError) -> None:
        # Tried twice a second: said once. While the engine starts nothing listens there, which is not worth saying.
        refusal = f"{error.code().name}: {error.details()}"
        if error.code() is not grpc.StatusCode.UNAVAILABLE and refusal != self._last_refusal:
            _log.warning("registering with the engine: %s", refusal)
        self._last_refusal = refusal
        metadata = dict(error.trailing_metadata() or ())
        mine, gangs = self._settings.attempt, attempts.read_attempt(metadata.get(attempts.METADATA))
        if gangs is not None and gangs > mine:
            cause = f"{attempts.STALE}the gang is at attempt {gangs}, this pod is of attempt {mine}"
            self._end_pod(Ending(ExitCode.RESTART_GANG, cause))
        elif attempts.MODEL_PATH_METADATA in metadata:
            # The branch has moved on between two downloads: both pods will find the newest commit next time.
            theirs = metadata[attempts.MODEL_PATH_METADATA]
            cause = f"the pods of this gang have different checkpoints: {self._settings.model_path} here, {theirs!s}"
            self._end_pod(Ending(ExitCode.RESTART_GANG, f"{cause} in the leader pod"))
        # An engine of a lower attempt is a leader that should be gone: its successor will be found under its name.
