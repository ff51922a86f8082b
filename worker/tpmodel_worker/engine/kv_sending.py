"""The gang that keeps a request's KV cache: gives it to the gang that comes with its ticket."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any

import grpc
import numpy as np

from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.kv_ranks import KvTransferError, RanksTransfer
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.kv.errors import KvMismatchError
from tpmodel_worker.kv.layout import KvLayout, check_compatible

logger = logging.getLogger(__name__)


class KvSending:
    """Any number of transfers at a time, each of another request. Plans go on meanwhile."""

    def __init__(self, world: ServedWorld, status: EngineStatus, *, deadline_seconds: float) -> None:
        """deadline_seconds: that connecting, and one piece of a cache, may take."""
        self._world = world
        self._status = status
        self._deadline_seconds = deadline_seconds
        self._numbers = itertools.count(1)
        self._ending: set[asyncio.Task[None]] = set()

    async def fetch(self, request: kv_pb2.FetchKvRequest) -> AsyncGenerator[kv_pb2.FetchKvResponse]:
        """What goes to the gang that fetches. Raises KvTransferError; what is kept then stays until it expires."""
        pool, loop, kv = self._world.pool, self._world.loop, self._world.kv
        if pool is None or loop is None or kv is None:
            raise KvTransferError(grpc.StatusCode.UNAVAILABLE, "world not built yet")
        kept = self._check(request, loop, kv.layout)
        loop.scheduler.handovers.begin(kept)
        transfer = RanksTransfer(f"send {next(self._numbers)}", pool, loop)
        fetched = False
        try:
            step = worker_pb2.KvTransferRequest(
                transfer=transfer.name,
                source=kv.layout,
                target=request.layout,
                blocks=kept.blocks,
                slot=max(kept.slot, 0),
                tokens=kept.tokens,
                deadline_seconds=self._deadline_seconds,
                send=worker_pb2.SendKv(device_ids=request.device_ids, world=request.world),
            )
            replies = await transfer.begin([step] * pool.world_size)
            endpoints = [endpoint for reply in replies for endpoint in reply.kv_transfer_ok.endpoints]
            yield kv_pb2.FetchKvResponse(offer=kv_pb2.KvOffer(layout=kv.layout, endpoints=endpoints))
            moved, seconds = await transfer.finish()
            fetched = True
            logger.info("%d tokens of KV, %d bytes, were fetched in %.3f s", kept.tokens, moved, seconds)
            yield kv_pb2.FetchKvResponse(sent=kv_pb2.KvSent(bytes=moved, seconds=seconds))
        finally:
            await asyncio.shield(self._in_background(_end(transfer, loop, kept, fetched=fetched)))

    def _check(self, request: kv_pb2.FetchKvRequest, loop: ServingLoop, layout: kv_pb2.KvLayout) -> Kept:
        """What is kept under the ticket, if it is what the other gang needs. Raises KvTransferError."""
        kept = loop.scheduler.handovers.find(request.ticket)
        if kept is None:
            message = (
                "nothing is kept under this ticket: it was fetched, has expired, or made room for running requests"
            )
            raise KvTransferError(grpc.StatusCode.NOT_FOUND, message)
        if kept.fetching:
            raise KvTransferError(grpc.StatusCode.ABORTED, "it is being fetched already")
        ours = self._status.state.weight_version
        if request.weight_version != ours:
            raise _mismatch(
                f"weight version: the gang that keeps the KV has {ours}, the one that asks {request.weight_version}"
            )
        if request.tokens != len(kept.token_ids):
            raise _mismatch(f"tokens: {len(kept.token_ids)} are kept, {request.tokens} are asked for")
        if request.token_digest != token_digest(kept.token_ids):
            raise _mismatch("tokens: those that are kept are other ones than those asked for")
        try:
            check_compatible(KvLayout.from_message(layout), KvLayout.from_message(request.layout))
        except KvMismatchError as error:
            raise _mismatch(str(error)) from error
        return kept

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        return task


async def _end(transfer: RanksTransfer, loop: ServingLoop, kept: Kept, *, fetched: bool) -> None:
    if not fetched:
        await transfer.cancel("the gang that fetches has gone, or a rank failed")
    loop.end_handover(kept, fetched=fetched)


def token_digest(token_ids: Sequence[int]) -> bytes:
    """SHA-256 over ids as little-endian 32-bit words."""
    return hashlib.sha256(np.array(token_ids, dtype="<u4").tobytes()).digest()


def _mismatch(message: str) -> KvTransferError:
    return KvTransferError(grpc.StatusCode.FAILED_PRECONDITION, message)
