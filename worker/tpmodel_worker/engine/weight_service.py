"""WeightService on the control port: what a trainer calls, and gangs that copy weights."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable

import grpc

from tpmodel.v1 import weights_pb2 as pb
from tpmodel.v1 import weights_pb2_grpc
from tpmodel_worker.auth import presented_token, update_group_key, weight_copy_key
from tpmodel_worker.engine.kv_ranks import KvTransferError
from tpmodel_worker.engine.weight_errors import UpdateError
from tpmodel_worker.engine.weight_sending import WeightSending
from tpmodel_worker.engine.weight_updates import WeightUpdates

WEIGHT_SERVICE = "tpmodel.v1.WeightService"


class WeightService(weights_pb2_grpc.WeightServiceServicer):
    """Turns calls into steps of the update, and refusals into status codes."""

    def __init__(
        self, updates: WeightUpdates, sending: WeightSending, weight_set: Callable[[], pb.WeightSet | None]
    ) -> None:
        """sending: lets other gangs copy; weight_set: what they are told of the weights, None: there is no world."""
        self._updates = updates
        self._sending = sending
        self._weight_set = weight_set

    async def GetParameterInfo(  # noqa: N802
        self, request: pb.GetParameterInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetParameterInfoResponse:
        """What the trainer may send."""
        async with _refusals(context):
            return await self._updates.describe()
        raise AssertionError("a refusal ends the call")

    async def InitUpdate(  # noqa: N802
        self, request: pb.InitUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.InitUpdateResponse:
        """Joins the trainer's group."""
        key = update_group_key(presented_token(context), request.master_address, request.master_port)
        async with _refusals(context):
            session = await self._updates.init(request, key)
            return pb.InitUpdateResponse(served=self._updates.served, session=session)
        raise AssertionError("a refusal ends the call")

    async def StartUpdate(  # noqa: N802
        self, request: pb.StartUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.StartUpdateResponse:
        """Pauses, or makes room."""
        async with _refusals(context):
            await self._updates.start(request.running, request.session)
        return pb.StartUpdateResponse(served=self._updates.served)

    async def AwaitUpdate(  # noqa: N802
        self, request: pb.AwaitUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.AwaitUpdateResponse:
        """Waits for the trainer to begin."""
        async with _refusals(context):
            reason = await self._updates.await_update(request)
            return pb.AwaitUpdateResponse(served=self._updates.served, stopped=bool(reason), reason=reason)
        raise AssertionError("a refusal ends the call")

    async def Update(  # noqa: N802
        self, request: pb.UpdateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.UpdateResponse]:
        """Receives tensors."""
        async with _refusals(context), contextlib.aclosing(self._updates.update(request)) as responses:
            async for response in responses:
                yield response

    async def FinishUpdate(  # noqa: N802
        self, request: pb.FinishUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.FinishUpdateResponse:
        """Commits."""
        async with _refusals(context):
            phases = await self._updates.finish(request.version, request.session)
            return pb.FinishUpdateResponse(served=self._updates.served, phases=phases)
        raise AssertionError("a refusal ends the call")

    async def AbortUpdate(  # noqa: N802
        self, request: pb.AbortUpdateRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortUpdateResponse:
        """Ends the update."""
        async with _refusals(context):
            await self._updates.abort(request.reason, request.session)
        return pb.AbortUpdateResponse(served=self._updates.served)

    async def GetVersion(  # noqa: N802
        self, request: pb.GetVersionRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetVersionResponse:
        """What is served; answered at any time."""
        return pb.GetVersionResponse(served=self._updates.served, set=self._weight_set())

    async def CopyWeights(  # noqa: N802
        self, request: pb.CopyWeightsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.CopyWeightsResponse]:
        """Moves the weights to the caller's ranks."""
        key = weight_copy_key(presented_token(context), request.nonce)
        async with _refusals(context), contextlib.aclosing(self._sending.copy(request, key)) as responses:
            async for response in responses:
                yield response


@contextlib.asynccontextmanager
async def _refusals(context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
    try:
        yield
    except (UpdateError, KvTransferError) as error:
        await context.abort(error.code, str(error))
