"""The gang that serves a version of the weights: lets another gang copy it."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import grpc

from tpmodel.v1 import weights_pb2, worker_pb2
from tpmodel_worker.engine.kv_ranks import KvTransferError, RanksTransfer
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.weight_peers import difference, weight_set
from tpmodel_worker.settings import ServeSettings

PIECE_SECONDS = 30.0
"""How long connecting two ranks, and one piece of an arena, may take."""

logger = logging.getLogger(__name__)


class _Sending:
    """A copy under way."""

    def __init__(self, transfer: RanksTransfer) -> None:
        self.transfer = transfer
        self.begun = asyncio.Event()
        """The ranks have begun, or have refused to."""


class WeightSending:
    """One copy at a time; plans go on meanwhile, for the ranks only read."""

    def __init__(
        self,
        world: ServedWorld,
        settings: ServeSettings,
        metrics: EngineMetrics,
        *,
        served: Callable[[], weights_pb2.ServedVersion],
        updating: Callable[[], bool],
    ) -> None:
        """served: what is served here; updating: whether a trainer's update has the weights, or is about to."""
        self._world = world
        self._settings = settings
        self._metrics = metrics
        self._served = served
        self._updating = updating
        self._numbers = itertools.count(1)
        self._current: _Sending | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def copy(
        self, request: weights_pb2.CopyWeightsRequest, key: str
    ) -> AsyncGenerator[weights_pb2.CopyWeightsResponse]:
        """What goes to the gang that copies. Raises KvTransferError. key: what the ranks of both prove to know."""
        pool, loop = self._world.pool, self._world.loop
        if pool is None or loop is None:
            raise KvTransferError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        self._check(request)
        transfer = RanksTransfer(f"send weights {next(self._numbers)}", pool, loop)
        self._current = sending = _Sending(transfer)
        sent = False
        try:
            step = worker_pb2.WeightCopyRequest(
                transfer=transfer.name,
                version=request.version,
                deadline_seconds=PIECE_SECONDS,
                key=key,
                send=worker_pb2.SendWeights(device_ids=request.device_ids),
            )
            try:
                replies = await transfer.begin([step] * pool.world_size)
            finally:
                sending.begun.set()
            offer = weights_pb2.WeightOffer(endpoints=[reply.weight_copy_ok.endpoint for reply in replies])
            yield weights_pb2.CopyWeightsResponse(offer=offer)
            moved, seconds = await transfer.finish()
            sent = True
            logger.info("version %d of the weights, %d bytes, was copied in %.3f s", request.version, moved, seconds)
            yield weights_pb2.CopyWeightsResponse(sent=weights_pb2.WeightsSent(bytes=moved, seconds=seconds))
        finally:
            await asyncio.shield(self._in_background(self._end(sending, sent=sent)))

    async def give_way(self, reason: str) -> None:
        """Returns once no rank reads the weights for another gang any more."""
        sending = self._current
        if sending is not None:
            await sending.begun.wait()
            await sending.transfer.cancel(reason)

    def _check(self, request: weights_pb2.CopyWeightsRequest) -> None:
        """Whether there is what is asked for. Raises KvTransferError."""
        served, kv = self._served(), self._world.kv
        if kv is None:
            raise KvTransferError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        if differs := difference(weight_set(self._settings, kv.layout), request.set):
            raise KvTransferError(grpc.StatusCode.FAILED_PRECONDITION, differs)
        if not served.HasField("version") or served.version != request.version:
            what = f"version {served.version}" if served.HasField("version") else f"nothing: {served.reason}"
            message = f"version {request.version} is asked for, this gang serves {what}"
            raise KvTransferError(grpc.StatusCode.FAILED_PRECONDITION, message)
        if self._updating():
            raise KvTransferError(grpc.StatusCode.ABORTED, "a trainer's update is under way")
        if self._current is not None:
            raise KvTransferError(grpc.StatusCode.RESOURCE_EXHAUSTED, "another gang is copying the weights")

    async def _end(self, sending: _Sending, *, sent: bool) -> None:
        try:
            if not sent:
                await sending.transfer.cancel("the gang that copies has gone, or a rank failed")
        finally:
            self._metrics.weight_copies.labels("sent", "done" if sent else "failed").inc()
            self._current = None

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task
