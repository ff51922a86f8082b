"""The engine's connection to one rank: its session stream and the unary calls beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf.message import DecodeError

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.errors import SessionClosedError, WrongRankError

EPOCH_METADATA = "tpmodel-epoch"
INSTANCE_METADATA = "tpmodel-instance"
_SESSION_METHOD = "/tpmodel.v1.WorkerService/Session"
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # It is this one that ends the connection when a ping stays unanswered; its default is a minute.
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A gang's addresses are never behind a proxy, whatever the environment says.
    ("grpc.enable_http_proxy", 0),
    # A rank that comes back listens elsewhere: a channel is never kept to wait for it.
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True, slots=True)
class RankEndpoint:
    """Where a rank's WorkerService listens."""

    rank: int
    address: str
    port: int
    pod: str = "local"
    pid: int = 0

    @property
    def target(self) -> str:
        """host:port as gRPC wants it."""
        return join_host_port(self.address, self.port)


class RankChannel:
    """The unary calls of one rank; they answer while its session is stuck in a collective."""

    def __init__(self, endpoint: RankEndpoint, token: str) -> None:
        self.endpoint = endpoint
        self.channel = grpc.aio.insecure_channel(endpoint.target, options=_CHANNEL_OPTIONS)
        self.metadata = token_metadata(token)
        self._stub = worker_pb2_grpc.WorkerServiceStub(self.channel)

    async def ping(self, timeout: float) -> worker_pb2.PingResponse:
        """Asks the rank for a sign of life. Raises WrongRankError, or AioRpcError when none comes."""
        response = await self._stub.Ping(worker_pb2.PingRequest(), timeout=timeout, metadata=self.metadata)
        self._check_rank(response.rank)
        return response

    async def get_status(self, timeout: float) -> worker_pb2.GetStatusResponse:
        """The rank's account of itself. Raises WrongRankError or AioRpcError."""
        response = await self._stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout, metadata=self.metadata)
        self._check_rank(response.rank)
        return response

    async def abort(self, epoch: int, reason: str, timeout: float) -> None:
        """Ends an epoch on the rank; returns once its computing thread has left it. Raises AioRpcError."""
        request = worker_pb2.AbortRequest(epoch=epoch, reason=reason)
        await self._stub.Abort(request, timeout=timeout, metadata=self.metadata)

    async def await_kv_transfer(self, transfer: str) -> worker_pb2.AwaitKvTransferResponse:
        """Returns once the rank's part of a KV transfer is over. Raises AioRpcError."""
        request = worker_pb2.AwaitKvTransferRequest(transfer=transfer)
        return await self._stub.AwaitKvTransfer(request, metadata=self.metadata)

    async def cancel_kv_transfer(self, transfer: str, reason: str, timeout: float) -> None:
        """Breaks a KV transfer off and returns when the rank has left it. Raises AioRpcError."""
        request = worker_pb2.CancelKvTransferRequest(transfer=transfer, reason=reason)
        await self._stub.CancelKvTransfer(request, timeout=timeout, metadata=self.metadata)

    async def close(self) -> None:
        """Closes the channel and with it every call on it."""
        await self.channel.close()

    def _check_rank(self, answered: int) -> None:
        if answered != self.endpoint.rank:
            raise WrongRankError(f"{self.endpoint.target} should be rank {self.endpoint.rank} but is rank {answered}")


class Session:
    """One epoch's bidirectional stream to one rank.

    Requests are handed over as bytes, so that what goes to every rank is serialised once. Responses and
    the end of the stream are told to callbacks, in order, from the event loop.
    """

    def __init__(
        self,
        channel: RankChannel,
        *,
        epoch: int,
        instance_id: str,
        on_response: Callable[[int, worker_pb2.SessionResponse], None],
        on_closed: Callable[[int, str], None],
    ) -> None:
        """on_closed gets the rank and what is known of the cause ("" for a regular end of the stream)."""
        self.rank = channel.endpoint.rank
        self._on_response = on_response
        self._on_closed = on_closed
        self._outgoing: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False
        metadata = (*channel.metadata, (EPOCH_METADATA, str(epoch)), (INSTANCE_METADATA, instance_id))
        # Without serialisers gRPC passes bytes through. It also turns a message that it can't read into
        # None, so reading is done here.
        open_stream = channel.channel.stream_stream(_SESSION_METHOD)
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] | None = cast(
            "grpc.aio.StreamStreamCall[bytes, bytes]", open_stream(self._requests(), metadata=metadata)
        )
        self._reader = asyncio.create_task(self._read(), name=f"session of rank {self.rank}")

    @property
    def closed(self) -> bool:
        """True once the stream has ended, from either side."""
        return self._closed

    def send(self, request: bytes) -> None:
        """Queues a serialised SessionRequest; never waits. Raises SessionClosedError after the end."""
        if self._closed:
            raise SessionClosedError(f"the session of rank {self.rank} has ended")
        self._outgoing.put_nowait(request)

    async def close(self, timeout: float) -> None:
        """Half-closes the stream, gives the rank `timeout` seconds to end it, then cancels it."""
        self._outgoing.put_nowait(None)
        await asyncio.wait([self._reader], timeout=timeout)
        if self._call is not None:
            self._call.cancel()
        await asyncio.wait([self._reader])
        # As long as the call exists, gRPC keeps the connection, though its channel is closed. This session and its pool
        # refer to each other, and would keep the call until the collector finds them.
        self._call = None

    async def _requests(self) -> AsyncIterator[bytes]:
        while (request := await self._outgoing.get()) is not None:
            yield request

    async def _read(self) -> None:
        call = self._call
        assert call is not None
        detail = "a response could not be handled"
        try:
            async for response in call:
                self._on_response(self.rank, worker_pb2.SessionResponse.FromString(response))
            detail = ""
        except grpc.aio.AioRpcError as error:
            detail = f"{error.code().name}: {error.details()}"
        except asyncio.CancelledError:
            detail = "cancelled by the engine"
        except DecodeError as error:
            detail = f"unreadable response: {error}"
        finally:
            self._closed = True
            call.cancel()
            self._on_closed(self.rank, detail)
