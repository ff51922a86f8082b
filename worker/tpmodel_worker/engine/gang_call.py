"""A call to another gang's engine, which offers something for the ranks to take and says when it has gone."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar, cast

import grpc

from tpmodel_worker.engine.kv_ranks import KvTransferError, RanksTransfer

_CHANNEL_OPTIONS = (
    # The other engine's machine may vanish without a word.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

Request = TypeVar("Request")
Response = TypeVar("Response")


def gang_channel(target: str) -> grpc.aio.Channel:
    """To another gang's control port."""
    return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)


class OfferCall(Generic[Request, Response]):
    """The call's two responses: an offer, and that everything was sent."""

    def __init__(self, call: object, kind: type[Response]) -> None:
        """call: a server-streaming one; kind: of its responses."""
        self._call = cast("grpc.aio.UnaryStreamCall[Request, Response]", call)
        self._kind = kind

    async def read(self) -> Response:
        """The next response. Raises KvTransferError where there is none, AioRpcError."""
        response = await self._call.read()
        if not isinstance(response, self._kind):
            raise KvTransferError(grpc.StatusCode.ABORTED, f"it said no more: {await self._call.details()}")
        return response

    async def finish(self, transfer: RanksTransfer, seconds: float) -> tuple[int, float]:
        """Waits for this gang's ranks, and beside them for word that the other gang has failed; bytes and seconds.

        seconds: how long the other gang may take to notice that everything has arrived. Raises as read.
        """
        ours = asyncio.create_task(transfer.finish())
        theirs = asyncio.create_task(self.read())
        try:
            done, _ = await asyncio.wait({ours, theirs}, return_when=asyncio.FIRST_COMPLETED)
            if ours not in done:
                theirs.result()
            moved = await ours
            await asyncio.wait({theirs}, timeout=seconds)
            return moved
        finally:
            for task in (ours, theirs):
                task.cancel()
            await asyncio.gather(ours, theirs, return_exceptions=True)

    def cancel(self) -> None:
        """Ends the call, if it has not ended. Idempotent."""
        self._call.cancel()
