"""One transfer on all ranks of a gang, of a request's KV or of the weights, as both gangs' engines drive it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.pool import Pool

_BEGIN_SECONDS = 30.0
_CANCEL_SECONDS = 15.0
_NEWS_SECONDS = 2.0


class KvTransferError(Exception):
    """A transfer that can't be, or did not end well; code is a grpc.StatusCode."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class RanksTransfer:
    """From begin to over: what the ranks do with a request's blocks, or with weights, is done by themselves."""

    def __init__(self, name: str, pool: Pool, loop: ServingLoop) -> None:
        self.name = name
        self._pool = pool
        self._loop = loop
        self._begun = False

    async def begin(
        self, requests: Sequence[worker_pb2.KvTransferRequest | worker_pb2.WeightCopyRequest]
    ) -> Sequence[worker_pb2.SessionResponse]:
        """Between two plans, behind all that were sent: every rank begins. Raises KvTransferError."""
        self._begun = True
        async with self._loop.between_plans():
            # Cancelled or not, every rank has answered before anything else happens.
            exchange = asyncio.create_task(self._pool.control(requests, Patience(_BEGIN_SECONDS)))
            try:
                return await asyncio.shield(exchange)
            except asyncio.CancelledError:
                await asyncio.wait({exchange})
                exchange.exception()
                raise
            except PoolError as error:
                raise KvTransferError(grpc.StatusCode.ABORTED, str(error)) from error

    async def finish(self) -> tuple[int, float]:
        """Returns once every rank has moved its part: bytes of all, seconds of the slowest. Raises KvTransferError."""
        try:
            outcomes = await self._pool.kv_outcomes(self.name)
        except grpc.aio.AioRpcError as error:
            message = f"a rank was lost meanwhile: {self._pool.error or error.details()}"
            raise KvTransferError(grpc.StatusCode.ABORTED, message) from error
        errors = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if errors:
            raise KvTransferError(grpc.StatusCode.ABORTED, "; ".join(errors))
        return sum(outcome.bytes for outcome in outcomes), max(outcome.seconds for outcome in outcomes)

    async def cancel(self, reason: str) -> bool:
        """Returns once no rank takes part in it any more; False: the world was lost, and all of it.

        A rank that does not leave it ends the world.
        """
        if not self._begun or self._pool.error is not None:
            return self._pool.error is None
        try:
            await self._pool.cancel_kv(self.name, reason, _CANCEL_SECONDS)
        except grpc.aio.AioRpcError as error:
            # A rank that can't be called may have ended: what has happened to it is about to be known.
            if not await self._pool.fails_within(_NEWS_SECONDS):
                self._pool.fault("a rank does not end a transfer", error)
        return self._pool.error is None
