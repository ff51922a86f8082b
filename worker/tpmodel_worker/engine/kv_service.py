"""KvService on the control port: what another gang calls that continues a request of this one."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc

from tpmodel.v1 import kv_pb2, kv_pb2_grpc
from tpmodel_worker.engine.kv_ranks import KvTransferError
from tpmodel_worker.engine.kv_sending import KvSending

KV_SERVICE = "tpmodel.v1.KvService"


class KvService(kv_pb2_grpc.KvServiceServicer):
    """Turns refusals into status codes."""

    def __init__(self, sending: KvSending) -> None:
        self._sending = sending

    async def Fetch(  # noqa: N802
        self, request: kv_pb2.FetchKvRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[kv_pb2.FetchKvResponse]:
        """Moves what is kept to the caller's ranks."""
        try:
            async with contextlib.aclosing(self._sending.fetch(request)) as responses:
                async for response in responses:
                    yield response
        except KvTransferError as error:
            await context.abort(error.code, str(error))
