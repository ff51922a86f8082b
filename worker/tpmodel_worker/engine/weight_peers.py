"""The other gangs of the model, as a gang sees them that may take its weights from one of them."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import grpc

from tpmodel.v1 import kv_pb2, weights_pb2, weights_pb2_grpc
from tpmodel_worker.addresses import join_host_port, split_host_port
from tpmodel_worker.auth import NoTokenError, token_metadata
from tpmodel_worker.engine.gang_call import gang_channel
from tpmodel_worker.settings import ServeSettings

_ANSWER_SECONDS = 3.0
_MOST = 64
"""Gangs that are asked at a time; which ones, where there are more, is chosen anew each time."""
_STARTS = "it has no weights yet"
# What has to be equal, and how it is called in a refusal.
_COMPARED = {
    "model_id": "model",
    "config_digest": "digest of config.json",
    "dtype": "dtype",
    "ranks": "tensor-parallel size",
    "expert_parallel": "expert parallelism",
    "revision": "revision of the checkpoint",
    "source": "checkpoint that versions count from",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another gang's answer."""

    target: str
    """Its control port."""
    version: int | None = None
    """What it serves, which this gang could have as it is; None: nothing of the kind."""
    refusal: str = ""
    """Why there is none."""


def weight_set(settings: ServeSettings, layout: kv_pb2.KvLayout) -> weights_pb2.WeightSet:
    """What a gang's weights are like. layout: of its KV cache, which says what the settings leave open."""
    return weights_pb2.WeightSet(
        model_id=layout.model_id,
        config_digest=layout.config_digest,
        dtype=layout.dtype,
        ranks=layout.ranks,
        expert_parallel=settings.expert_parallel,
        revision=settings.model_revision,
        source=settings.weights_source,
    )


def difference(theirs: weights_pb2.WeightSet, ours: weights_pb2.WeightSet) -> str:
    """The first thing in which two gangs differ, with both values; "": one's shards can be the other's."""
    for field, name in _COMPARED.items():
        there, here = getattr(theirs, field), getattr(ours, field)
        if there != here:
            return f"{name}: {there!r} there, {here!r} here"
    return ""


class WeightPeers:
    """Asks them. Names are looked up anew each time."""

    def __init__(self, targets: Sequence[str], *, token: Callable[[], Awaitable[str]], address: str) -> None:
        """targets: `host:port` of control ports; a name stands for all its addresses. address: IP of this pod.

        token: reads the trainer's token, which all of them take; raises NoTokenError.
        """
        self._targets = targets
        self.token = token
        self._address = address
        self.own_port = 0
        """Of this gang's control port, which may be among the addresses of a name."""

    def __bool__(self) -> bool:
        return bool(self._targets)

    async def ask(self, ours: weights_pb2.WeightSet) -> list[Peer]:
        """What each of them has, those with the newest version first."""
        found = await asyncio.gather(*(self._addresses(target) for target in self._targets))
        own = join_host_port(self._address, self.own_port)
        silent = [answer for answer in found if isinstance(answer, Peer)]
        targets = {target for answer in found if not isinstance(answer, Peer) for target in answer} - {own}
        asked = random.sample(sorted(targets), min(len(targets), _MOST))  # spreads the load; nothing is secret
        try:
            token = await self.token()
        except NoTokenError as error:
            return [Peer(target, refusal=str(error)) for target in asked]
        peers = silent + await asyncio.gather(*(self._ask(target, ours, token) for target in asked))
        return sorted(peers, key=lambda peer: -1 if peer.version is None else peer.version, reverse=True)

    async def newest(self, ours: weights_pb2.WeightSet) -> int:
        """The newest version that one of them serves; 0 where none does that could be copied."""
        peers = await self.ask(ours)
        refused = [f"{peer.target}: {peer.refusal}" for peer in peers if peer.refusal != _STARTS]
        if refused and all(peer.version is None for peer in peers):
            logger.warning("no other gang says which version of the weights it serves: %s", "; ".join(refused))
        return max((peer.version or 0 for peer in peers), default=0)

    async def _addresses(self, target: str) -> list[str] | Peer:
        host, port = split_host_port(target)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                answers = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError, TimeoutError) as error:
            return Peer(target, refusal=f"its name has no address: {error or 'no answer'}")
        return [join_host_port(str(address[0]), port) for *_, address in answers]

    async def _ask(self, target: str, ours: weights_pb2.WeightSet, token: str) -> Peer:
        async with gang_channel(target) as channel:
            stub = weights_pb2_grpc.WeightServiceStub(channel)
            call = stub.GetVersion(
                weights_pb2.GetVersionRequest(), metadata=token_metadata(token), timeout=_ANSWER_SECONDS
            )
            try:
                answer = await call
            except grpc.aio.AioRpcError as error:
                return Peer(target, refusal=f"{error.code().name}: {error.details()}")
        if not answer.HasField("set"):
            return Peer(target, refusal=_STARTS)
        if differs := difference(answer.set, ours):
            return Peer(target, refusal=differs)
        if not answer.served.HasField("version"):
            return Peer(target, refusal=f"it serves nothing: {answer.served.reason}")
        return Peer(target, version=answer.served.version)
