"""One gang, as its trainer calls it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc

from tpmodel.channel import WEIGHT_OPTIONS, metadata
from tpmodel.trainer.errors import WeightUpdateError
from tpmodel.v1 import weights_pb2 as pb
from tpmodel.v1 import weights_pb2_grpc
from tpmodel_worker.weights.numbering import indexed_tensors
from tpmodel_worker.weights.packing import TensorInfo

_CALL_SECONDS = 60.0


class Gang:
    """WeightService of one leader. Every call raises WeightUpdateError."""

    def __init__(self, target: str, token: str) -> None:
        self.target = target
        self._channel = grpc.insecure_channel(target, options=WEIGHT_OPTIONS)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self._metadata = metadata(token)
        self.device = ""
        self.world_size = 0
        self.parameters: dict[str, pb.ParameterInfo] = {}
        self._session = ""

    def describe(self) -> None:
        """Asks what the gang's model is made of."""
        reply = self._call(self._stub.GetParameterInfo, pb.GetParameterInfoRequest(), _CALL_SECONDS)
        self.device, self.world_size = reply.device, reply.world_size
        self.parameters = {parameter.name: parameter for parameter in reply.parameters}

    def init(self, request: pb.InitUpdateRequest, seconds: float) -> None:
        """Returns when all ranks have joined the trainer's group."""
        self._session = self._call(self._stub.InitUpdate, request, seconds).session

    def start(self, running: pb.RunningRequests.ValueType, seconds: float) -> None:
        """Returns when generation is paused."""
        request = pb.StartUpdateRequest(running=running, session=self._session)
        self._call(self._stub.StartUpdate, request, seconds)

    def finish(self, version: int) -> None:
        """Returns when the new weights are served."""
        request = pb.FinishUpdateRequest(version=version, session=self._session)
        self._call(self._stub.FinishUpdate, request, 4 * _CALL_SECONDS)

    def abort(self, reason: str) -> None:
        """Returns when the update is over."""
        request = pb.AbortUpdateRequest(reason=reason, session=self._session)
        self._call(self._stub.AbortUpdate, request, _CALL_SECONDS)

    def version(self) -> int | None:
        """The version being served; None: the gang serves nothing, for want of whole weights."""
        served = self._served()
        return served.version if served.HasField("version") else None

    def check_version(self, version: int) -> None:
        """Raises WeightUpdateError unless it is above all that the gang has ever had: in place, a refusal after the
        tensors have come would leave the gang without whole weights."""
        newest = self._served().newest_version
        if version <= newest:
            message = f"gang {self.target}: version {version} does not follow version {newest}: send one above it"
            raise WeightUpdateError("INVALID_ARGUMENT", message)

    def update(self, request: pb.UpdateRequest, on_failure: Callable[[str], None]) -> UpdateCall:
        """Begins a call that goes on while the tensors are sent."""
        own = pb.UpdateRequest()
        own.CopyFrom(request)
        own.session = self._session
        return UpdateCall(self, self._stub.Update(own, metadata=self._metadata), on_failure)

    def check(self, tensor: TensorInfo) -> None:
        """Raises ValueError unless the model has a tensor of that name and shape."""
        parameter = self.parameters.get(tensor.name)
        if parameter is None:
            raise ValueError(f"the model of {self.target} has no tensor {tensor.name}: names are the checkpoint's")
        if tuple(parameter.shape) != tensor.shape:
            raise ValueError(
                f"{tensor.name} has shape {tensor.shape}, the model of {self.target} has {tuple(parameter.shape)}"
            )

    def indexed_set(self) -> pb.UpdateRequest:
        """Every tensor that is not tied, in the order of its index."""
        return indexed_tensors(list(self.parameters.values()))

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._channel.close()

    def failure(self, error: grpc.RpcError) -> WeightUpdateError:
        """What gRPC raised, in words that say which gang."""
        assert isinstance(error, grpc.Call)
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            message = f"{self.target} is no control port, or not of a gang that can be updated: {error.details()}"
            return WeightUpdateError(error.code().name, message)
        return WeightUpdateError(error.code().name, f"gang {self.target}: {error.details() or 'no details'}")

    def _served(self) -> pb.ServedVersion:
        return self._call(self._stub.GetVersion, pb.GetVersionRequest(), _CALL_SECONDS).served

    def _call(self, method: Any, request: Any, seconds: float) -> Any:
        try:
            return method(request, metadata=self._metadata, timeout=seconds)
        except grpc.RpcError as error:
            raise self.failure(error) from error


class UpdateCall:
    """One Update call: a thread reads how far the gang is."""

    def __init__(self, gang: Gang, call: Any, on_failure: Callable[[str], None]) -> None:
        """on_failure(reason): called in the thread, so that a sender that waits for the gang is released."""
        self._gang = gang
        self._call = call
        self._on_failure = on_failure
        self._ready = threading.Event()
        self._received = False
        self._error: WeightUpdateError | None = None
        self.received_bytes = 0
        self._thread = threading.Thread(target=self._read, name=f"update of {gang.target}", daemon=True)
        self._thread.start()

    def wait_until_ready(self) -> None:
        """Returns when all ranks have accepted the tensors and wait for them. Raises WeightUpdateError."""
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def wait_until_received(self) -> None:
        """Returns when all ranks have everything. Raises WeightUpdateError."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        if not self._received:
            raise WeightUpdateError(
                "ABORTED", f"gang {self._gang.target}: the call ended before the tensors were there"
            )

    @property
    def error(self) -> WeightUpdateError | None:
        """What ended the call."""
        return self._error

    def cancel(self) -> None:
        """Ends the call, and with it the gang's part of the update."""
        self._call.cancel()
        self._thread.join()

    def _read(self) -> None:
        try:
            for response in self._call:
                self.received_bytes = response.received_bytes
                if response.stage == pb.UpdateResponse.STAGE_READY:
                    self._ready.set()
                self._received = response.stage == pb.UpdateResponse.STAGE_RECEIVED
        except grpc.RpcError as error:
            self._error = self._gang.failure(error)
            self._on_failure(str(self._error))
        finally:
            self._ready.set()
