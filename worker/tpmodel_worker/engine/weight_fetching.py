"""The gang that has lost its weights: copies them from another gang of the model that serves them.

It asks again and again, with growing pauses, until one of the others, or a trainer, has healed it. Until then the
condition stays WeightsLost, and its message says why.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import grpc

from tpmodel.v1 import weights_pb2, weights_pb2_grpc, worker_pb2
from tpmodel_worker.auth import NoTokenError, token_metadata, weight_copy_key
from tpmodel_worker.engine.errors import PoolError
from tpmodel_worker.engine.exchange import Patience
from tpmodel_worker.engine.gang_call import OfferCall, gang_channel
from tpmodel_worker.engine.kv_ranks import KvTransferError, RanksTransfer
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.metrics import EngineMetrics
from tpmodel_worker.engine.pool import Pool
from tpmodel_worker.engine.served_world import ServedWorld
from tpmodel_worker.engine.status import WEIGHTS_LOST, EngineStatus
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_peers import Peer, WeightPeers, weight_set
from tpmodel_worker.engine.weight_sending import PIECE_SECONDS
from tpmodel_worker.settings import ServeSettings

_TOTAL_SECONDS = 1800.0
"""Most that a copy may take, however steadily it goes on."""
_COMMIT_SECONDS = 60.0
_FIRST_PAUSE_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0
_GAVE_WAY = "it was broken off for a trainer's update"

logger = logging.getLogger(__name__)


class WeightFetching:
    """One copy at a time. A trainer's update comes first: a copy gives way to it."""

    def __init__(
        self,
        world: ServedWorld,
        settings: ServeSettings,
        status: EngineStatus,
        metrics: EngineMetrics,
        peers: WeightPeers,
        *,
        updating: Callable[[], bool],
        adopt: Callable[[int], Awaitable[None]],
    ) -> None:
        """updating: whether a trainer's update has the weights, or is about to.

        adopt: serves a version that every rank has committed; raises UpdateError, PoolError.
        """
        self._world = world
        self._settings = settings
        self._status = status
        self._metrics = metrics
        self._peers = peers
        self._updating = updating
        self._adopt = adopt
        self._numbers = itertools.count(1)
        self._trying: asyncio.Task[None] | None = None
        self._copying: asyncio.Task[str] | None = None

    def world_serves(self) -> None:
        """A world begins: where its weights are lost they are looked for; what was done for the one before ends."""
        if self._trying is not None:
            self._trying.cancel()
            self._trying = None
        pool, loop = self._world.pool, self._world.loop
        if self._peers and self._lost and pool is not None and loop is not None:
            self._trying = asyncio.create_task(self._try(pool, loop), name="weights of another gang")

    async def give_way(self) -> None:
        """Returns once no rank receives weights from another gang any more; it is tried again later."""
        copying = self._copying
        if copying is not None:
            copying.cancel()
            await asyncio.wait({copying})

    async def close(self) -> None:
        """The engine ends."""
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.gather(self._trying, return_exceptions=True)

    @property
    def _lost(self) -> bool:
        return self._status.weights_condition == WEIGHTS_LOST

    async def _try(self, pool: Pool, loop: ServingLoop) -> None:
        """Until the weights are there, in whatever way, or the world has gone."""
        lost = self._status.state.weights_message
        pause, said = _FIRST_PAUSE_SECONDS, ""
        while self._goes_on(pool):
            failures = await self._ask_all(pool, loop, lost)
            if not self._goes_on(pool):
                return
            self._status.set_weights_condition(WEIGHTS_LOST, f"{lost}; not from another gang: {failures}")
            # It may go on for days.
            level = logging.DEBUG if failures == said else logging.WARNING
            logger.log(level, "no weights from another gang, they are asked again and again: %s", failures)
            said = failures
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _goes_on(self, pool: Pool) -> bool:
        return self._lost and pool is self._world.pool and pool.error is None

    async def _ask_all(self, pool: Pool, loop: ServingLoop, lost: str) -> str:
        """Copies from the first gang that gives what is wanted; why none did."""
        kv = self._world.kv
        if kv is None:
            return "world not built yet"
        ours, wanted = weight_set(self._settings, kv.layout), self._status.newest_version
        failures: list[str] = []
        for peer in await self._peers.ask(ours):
            if not self._goes_on(pool):
                break
            failure = _refusal(peer, wanted)
            if not failure and self._updating():
                failure = "a trainer's update is under way here"
            if not failure:
                said = f"{lost}; version {peer.version} is being copied from {peer.target}"
                self._status.set_weights_condition(WEIGHTS_LOST, said)
                failure = await self._run_copy(self._copy(pool, loop, peer, ours, list(kv.device_ids)))
                if not failure:
                    break
            failures.append(f"{peer.target}: {failure}")
        # In an order that stays: the operator writes what changes.
        return "; ".join(sorted(failures)) or "there is none"

    async def _run_copy(self, copy: Coroutine[Any, Any, str]) -> str:
        self._copying = copying = asyncio.create_task(copy)
        try:
            await asyncio.wait({copying})
        except asyncio.CancelledError:
            copying.cancel()
            await asyncio.wait({copying})
            raise
        finally:
            if self._copying is copying:
                self._copying = None
        # Only give_way cancels it alone.
        return _GAVE_WAY if copying.cancelled() else copying.result()

    async def _copy(
        self, pool: Pool, loop: ServingLoop, peer: Peer, ours: weights_pb2.WeightSet, device_ids: list[str]
    ) -> str:
        """Copies, and serves what has come; "", or why that failed. Cancelled, it ends in order."""
        version = peer.version or 0
        transfer = RanksTransfer(f"receive weights {next(self._numbers)}", pool, loop)
        try:
            async with asyncio.timeout(_TOTAL_SECONDS):
                moved, seconds = await self._receive(peer.target, version, transfer, ours, device_ids)
            await self._commit(pool, loop, transfer, version)
        except asyncio.CancelledError:
            failure = _GAVE_WAY
        except TimeoutError:
            failure = f"not done within {_TOTAL_SECONDS:g} s"
        except (KvTransferError, UpdateError, PoolError, NoTokenError) as error:
            failure = str(error)
        except grpc.aio.AioRpcError as error:
            failure = f"{error.code().name}: {error.details()}"
        else:
            self._metrics.weight_copies.labels("received", "done").inc()
            logger.info(
                "version %d of the weights, %d bytes, from %s in %.3f s",
                version,
                moved,
                peer.target,
                seconds,
                extra={"epoch": pool.epoch},
            )
            return ""
        self._metrics.weight_copies.labels("received", "failed").inc()
        await transfer.cancel(failure)
        return failure

    async def _receive(
        self,
        target: str,
        version: int,
        transfer: RanksTransfer,
        ours: weights_pb2.WeightSet,
        device_ids: list[str],
    ) -> tuple[int, float]:
        """Every rank has what the other gang committed, checked; bytes and seconds."""
        token, nonce = await self._peers.token(), secrets.token_hex(16)
        request = weights_pb2.CopyWeightsRequest(version=version, set=ours, device_ids=device_ids, nonce=nonce)
        async with gang_channel(target) as channel:
            stub = weights_pb2_grpc.WeightServiceStub(channel)
            call: OfferCall[weights_pb2.CopyWeightsRequest, weights_pb2.CopyWeightsResponse] = OfferCall(
                stub.CopyWeights(request, metadata=token_metadata(token)),
                weights_pb2.CopyWeightsResponse,
            )
            try:
                response = await call.read()
                endpoints = response.offer.endpoints
                if len(endpoints) != ours.ranks:
                    message = f"it says where {len(endpoints)} ranks wait, this gang has {ours.ranks}"
                    raise KvTransferError(grpc.StatusCode.ABORTED, message)
                steps = [
                    worker_pb2.WeightCopyRequest(
                        transfer=transfer.name,
                        version=version,
                        deadline_seconds=PIECE_SECONDS,
                        key=weight_copy_key(token, nonce),
                        receive=worker_pb2.CopyWeightsFrom(endpoint=endpoint),
                    )
                    for endpoint in endpoints
                ]
                await transfer.begin(steps)
                return await call.finish(transfer, PIECE_SECONDS)
            finally:
                call.cancel()

    async def _commit(self, pool: Pool, loop: ServingLoop, transfer: RanksTransfer, version: int) -> None:
        """Version and digests go into every rank's manifest. Once begun it goes on to its end. Raises PoolError."""
        commit = worker_pb2.WeightCopyRequest(
            transfer=transfer.name, version=version, commit=worker_pb2.CommitWeightCopy()
        )

        async def run() -> None:
            async with loop.between_plans():
                await pool.control([commit] * pool.world_size, Patience(_COMMIT_SECONDS))
            await self._adopt(version)

        committing = asyncio.create_task(run())
        try:
            await asyncio.shield(committing)
        except asyncio.CancelledError:
            await asyncio.wait({committing})
            committing.result()


def _refusal(peer: Peer, wanted: int) -> str:
    """Why a gang's weights are not what is wanted; "": they are."""
    if peer.version is None:
        return peer.refusal
    if peer.version < wanted:
        return f"it serves version {peer.version}, wanted is {wanted}"
    return ""
