"""A gang as a trainer sees it: WeightService with one rank, in this process, that really joins and receives.

It takes the steps that trainers' tests need, in their order, and has no model behind it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import grpc
import torch

from tpmodel.v1 import weights_pb2 as pb
from tpmodel.v1 import weights_pb2_grpc
from tpmodel_worker.auth import update_group_key
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.weights.broadcast import Broadcaster
from tpmodel_worker.weights.group import join_update_group
from tpmodel_worker.weights.member import GroupMember
from tpmodel_worker.weights.packing import read_update
from tpmodel_worker.weights.ranks import update_rank

SHAPES = {"first": (4, 3), "second": (5,)}


class Trainee(weights_pb2_grpc.WeightServiceServicer):
    """One gang; listens on `target` while the `with` block lasts."""

    def __init__(self, token: str, address: str = "127.0.0.1", port: int = 0, *, version: int = 0) -> None:
        self.version: int | None = version
        self.newest = version
        """The highest that it has ever had."""
        self.weights: dict[str, torch.Tensor] = {}
        self.steps: list[str] = []
        """Steps taken, in order."""
        self.fails_at = ""
        """Step that is refused, once."""
        self._token = token
        self._address = address
        self._group: Communicator | None = None
        self._started = False
        self._session = ""
        self._joined = 0
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(8))
        weights_pb2_grpc.add_WeightServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"{address}:{port}")
        self.target = f"{address}:{self.port}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop(None).wait()
        self.lose_world()

    def lose_world(self) -> None:
        """A new world: the trainer's group is gone with the one before."""
        group, self._group = self._group, None
        self._started = False
        if group is not None:
            group.abort("the world was lost")
            group.close()

    # -------------------------------------------------------------------------------------------- the calls

    def GetParameterInfo(self, request: Any, context: grpc.ServicerContext) -> pb.GetParameterInfoResponse:  # noqa: N802
        self._step("describe", context)
        parameters = [pb.ParameterInfo(name=name, shape=shape, dtype="float32") for name, shape in SHAPES.items()]
        return pb.GetParameterInfoResponse(parameters=parameters, device="cpu", world_size=1)

    def InitUpdate(self, request: pb.InitUpdateRequest, context: grpc.ServicerContext) -> pb.InitUpdateResponse:  # noqa: N802
        self._step("init", context)
        self.lose_world()
        member = GroupMember(
            master_address=request.master_address,
            master_port=request.master_port,
            rank=update_rank(gang_index=request.gang_index, world_size=1, rank=0, offset=request.rank_offset),
            size=request.world_size,
            device=torch.device("cpu"),
            address=self._address,
            timeout_seconds=request.timeout_seconds,
            deadline_seconds=request.deadline_seconds,
        )
        self._group = join_update_group(
            member, key=update_group_key(self._token, request.master_address, request.master_port)
        )
        self._joined += 1
        self._session = f"session {self._joined}"
        return pb.InitUpdateResponse(session=self._session)

    def StartUpdate(self, request: Any, context: grpc.ServicerContext) -> pb.StartUpdateResponse:  # noqa: N802
        self._step("start", context, request)
        if self._group is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this call is due when it is initialised")
        self._started = True
        return pb.StartUpdateResponse()

    def AwaitUpdate(self, request: Any, context: grpc.ServicerContext) -> pb.AwaitUpdateResponse:  # noqa: N802
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "trainers of the ordered transport do not call this")
        raise AssertionError("the call was ended")

    def Update(self, request: pb.UpdateRequest, context: grpc.ServicerContext) -> Iterator[pb.UpdateResponse]:  # noqa: N802
        self._step("update", context, request)
        group = self._group
        assert group is not None
        self.version = None
        tensors = read_update(request)
        broadcaster = Broadcaster(
            group, tensors, buffer_size=request.buffer_size, buffer_count=max(request.buffer_count, 1)
        )
        yield pb.UpdateResponse(stage=pb.UpdateResponse.STAGE_READY)
        broadcaster.receive(self._take, lambda _done: None, 30)
        yield pb.UpdateResponse(stage=pb.UpdateResponse.STAGE_RECEIVED)

    def FinishUpdate(self, request: pb.FinishUpdateRequest, context: grpc.ServicerContext) -> pb.FinishUpdateResponse:  # noqa: N802
        self._step("finish", context, request)
        self._started = False
        self.version = self.newest = request.version
        return pb.FinishUpdateResponse()

    def AbortUpdate(self, request: Any, context: grpc.ServicerContext) -> pb.AbortUpdateResponse:  # noqa: N802
        self._step("abort", context, request)
        self.lose_world()
        return pb.AbortUpdateResponse()

    def CopyWeights(self, request: Any, context: grpc.ServicerContext) -> Iterator[pb.CopyWeightsResponse]:  # noqa: N802
        raise AssertionError("trainers copy no weights")

    def GetVersion(self, request: Any, context: grpc.ServicerContext) -> pb.GetVersionResponse:  # noqa: N802
        return pb.GetVersionResponse(served=pb.ServedVersion(version=self.version, newest_version=self.newest))

    def _take(self, name: str, tensor: torch.Tensor) -> None:
        self.weights[name] = tensor.clone()

    def _step(self, name: str, context: grpc.ServicerContext, request: Any = None) -> None:
        """request: one that has to carry the session, where anybody has joined."""
        if request is not None and self._session and request.session != self._session:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "another trainer has taken this gang over")
        with self._lock:
            self.steps.append(name)
            fails, self.fails_at = self.fails_at == name, "" if self.fails_at == name else self.fails_at
        if fails:
            context.abort(grpc.StatusCode.ABORTED, f"{name} fails")
