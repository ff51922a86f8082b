"""Presents this pod and its ranks to the engine, and does so again whenever something may have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import grpc

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata

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
)


class Registration:
    """The supervisor's client of the engine's GangService."""

    def __init__(self, target: str, token: str, request: Callable[[], worker_pb2.RegisterRequest | None]) -> None:
        """target: host:port of the engine's control port. request: what to say now; None where it is too early."""
        self._target = target
        self._token = token
        self._request = request
        self._changed = asyncio.Event()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self._instance_id = ""
        self._last_refusal = ""

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
        async with grpc.aio.insecure_channel(self._target, options=_CHANNEL_OPTIONS) as channel:
            stub = worker_pb2_grpc.GangServiceStub(channel)
            while True:
                self._changed.clear()
                request = self._request()
                if request is None:
                    await self._changed.wait()
                elif await self._register(stub, request):
                    await self._change_or_break(channel)
                else:
                    await asyncio.sleep(_RETRY_SECONDS)

    async def _register(self, stub: worker_pb2_grpc.GangServiceAsyncStub, request: worker_pb2.RegisterRequest) -> bool:
        request.instance_id_seen = self._instance_id
        self._quiet.clear()
        try:
            response = await stub.Register(request, timeout=_CALL_SECONDS, metadata=token_metadata(self._token))
        except grpc.aio.AioRpcError as error:
            self._note_refusal(error)
            return False
        finally:
            self._quiet.set()
        if response.instance_id != self._instance_id:
            _log.info("registered with engine instance %s", response.instance_id)
        self._instance_id = response.instance_id
        return True

    def _note_refusal(self, error: grpc.aio.AioRpcError) -> None:
        # Tried twice a second: said once. While the engine starts nothing listens there, which is not worth saying.
        refusal = f"{error.code().name}: {error.details()}"
        if error.code() is not grpc.StatusCode.UNAVAILABLE and refusal != self._last_refusal:
            _log.warning("registering with the engine: %s", refusal)
        self._last_refusal = refusal

    async def _change_or_break(self, channel: grpc.aio.Channel) -> None:
        waits = [
            asyncio.create_task(self._changed.wait()),
            asyncio.create_task(channel.wait_for_state_change(grpc.ChannelConnectivity.READY)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
