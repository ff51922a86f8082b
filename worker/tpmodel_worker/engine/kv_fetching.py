"""The gang that continues a request: fetches its KV cache from the gang that keeps it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Mapping
from types import MappingProxyType

import grpc

from tpmodel.v1 import kv_pb2, kv_pb2_grpc, worker_pb2
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.build import GangCache
from tpmodel_worker.engine.gang_call import OfferCall, gang_channel
from tpmodel_worker.engine.kv_ranks import KvTransferError, RanksTransfer
from tpmodel_worker.engine.kv_sending import token_digest
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.requests import UNAVAILABLE, Fetch
from tpmodel_worker.engine.served_world import ServedWorld

logger = logging.getLogger(__name__)

_TOTAL_SECONDS = 600.0
"""Most that a transfer may take, however steadily it goes on."""
_REMEDY = "send the request without kv_source: its prompt is computed again"
# What another try does not change, and the google.rpc.Code that the client gets; all else is UNAVAILABLE.
_FINAL: Mapping[grpc.StatusCode, int] = MappingProxyType(
    {
        grpc.StatusCode.NOT_FOUND: 5,
        grpc.StatusCode.FAILED_PRECONDITION: 3,
        grpc.StatusCode.INVALID_ARGUMENT: 3,
        # The two gangs have different tokens, or are of different releases.
        grpc.StatusCode.UNAUTHENTICATED: 9,
        grpc.StatusCode.UNIMPLEMENTED: 9,
    }
)


class KvFetching:
    """Any number of requests at a time. Plans go on meanwhile; a request joins them when its KV is there."""

    def __init__(self, world: ServedWorld, *, token: str, deadline_seconds: float) -> None:
        """token: the gang's, which the other one has too; deadline_seconds: for connecting and one piece of a cache."""
        self._world = world
        self._token = token
        self._deadline_seconds = deadline_seconds
        self._numbers = itertools.count(1)
        self._name = secrets.token_hex(8)
        self._tasks: dict[Fetch, asyncio.Task[None]] = {}

    def begin(self, fetch: Fetch) -> None:
        """Fetches in the background; the loop hears how it ended."""
        task = asyncio.get_running_loop().create_task(self._run(fetch), name=f"fetch of {fetch.request_id}")
        self._tasks[fetch] = task
        task.add_done_callback(lambda _: self._tasks.pop(fetch, None))

    def drop(self, fetch: Fetch) -> None:
        """Its request has ended: breaks it off."""
        task = self._tasks.pop(fetch, None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """The engine ends."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, fetch: Fetch) -> None:
        pool, loop, kv = self._world.pool, self._world.loop, self._world.kv
        if pool is None or loop is None or kv is None:
            return  # the world is lost, and with it the blocks
        transfer = RanksTransfer(f"receive {next(self._numbers)}", pool, loop)
        code = UNAVAILABLE
        try:
            async with asyncio.timeout(_TOTAL_SECONDS):
                moved, seconds = await self._fetch(fetch, transfer, pool, kv)
        except asyncio.CancelledError:
            message = "the request has ended"
        except TimeoutError:
            message = f"not done within {_TOTAL_SECONDS:g} s"
        except KvTransferError as error:
            message = str(error)
        except grpc.aio.AioRpcError as error:
            message = f"{error.code().name}: {error.details()}"
            code = _FINAL.get(error.code(), UNAVAILABLE)
        else:
            logger.info(
                "%d tokens of KV, %d bytes, from %s in %.3f s",
                fetch.tokens,
                moved,
                fetch.source.target,
                seconds,
                extra={"request_id": fetch.request_id},
            )
            loop.fetched(fetch)
            return
        await self._give_up(fetch, transfer, loop, code, message)

    async def _give_up(self, fetch: Fetch, transfer: RanksTransfer, loop: ServingLoop, code: int, message: str) -> None:
        logger.warning("no KV from %s: %s", fetch.source.target, message, extra={"request_id": fetch.request_id})
        if not await transfer.cancel(message):
            return  # the request is replayed in the next world, or fails with this one
        loop.fetch_failed(fetch, code, f"kv_source: no KV from {fetch.source.target}: {message}; {_REMEDY}")

    async def _fetch(self, fetch: Fetch, transfer: RanksTransfer, pool: Pool, kv: GangCache) -> tuple[int, float]:
        request = kv_pb2.FetchKvRequest(
            ticket=fetch.source.ticket,
            layout=kv.layout,
            weight_version=fetch.weight_version,
            tokens=len(fetch.token_ids),
            token_digest=token_digest(fetch.token_ids),
            device_ids=kv.device_ids,
            # Of this process, too: another one counts its epochs anew.
            world=f"{self._name}/{pool.epoch}",
        )
        async with gang_channel(fetch.source.target) as channel:
            stub = kv_pb2_grpc.KvServiceStub(channel)
            call: OfferCall[kv_pb2.FetchKvRequest, kv_pb2.FetchKvResponse] = OfferCall(
                stub.Fetch(request, metadata=token_metadata(self._token)), kv_pb2.FetchKvResponse
            )
            try:
                offer = await call.read()
                if not offer.HasField("offer"):
                    raise KvTransferError(grpc.StatusCode.ABORTED, "it did not say where its ranks wait")
                step = worker_pb2.KvTransferRequest(
                    transfer=transfer.name,
                    source=offer.offer.layout,
                    target=kv.layout,
                    blocks=fetch.blocks,
                    slot=fetch.slot,
                    tokens=fetch.tokens,
                    deadline_seconds=self._deadline_seconds,
                    receive=worker_pb2.ReceiveKv(endpoints=offer.offer.endpoints),
                )
                await transfer.begin([step] * pool.world_size)
                # Once everything is here, the other gang's blocks are free when it knows the same.
                return await call.finish(transfer, self._deadline_seconds)
            finally:
                call.cancel()
