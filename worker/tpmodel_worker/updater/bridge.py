"""Drives a gang's WeightService for a trainer that does not know it: join, wait for a set, receive, commit, again."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc

from tpmodel.channel import WEIGHT_OPTIONS, metadata
from tpmodel.v1 import weights_pb2 as pb
from tpmodel.v1 import weights_pb2_grpc
from tpmodel_worker.updater.layout import Layout
from tpmodel_worker.weights.numbering import indexed_tensors

MAX_ERRORS = 5
"""So many in a row, without a set in between, end the updater."""
RETRY_SECONDS = 1.0
_CALL_SECONDS = 60.0
_FINISH_SECONDS = 3600.0

_FINAL = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
)
"""What no second try changes."""

logger = logging.getLogger(__name__)


class GangError(Exception):
    """The gang refused a call, or cannot be reached."""

    def __init__(self, target: str, code: grpc.StatusCode, details: str) -> None:
        if code is grpc.StatusCode.UNIMPLEMENTED:
            details = f"that is no control port of a gang that can be updated: {details}"
        super().__init__(f"gang {target}: {code.name}: {details}")
        self.code = code


class StoppedError(Exception):
    """The trainer has ended the exchange before its set was full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BridgeOptions:
    """What the trainer and the user have chosen."""

    master_address: str
    master_port: int
    backend: str = ""
    """nccl or gloo; empty: by the gang's device."""
    mode: pb.UpdateMode.ValueType = pb.UPDATE_MODE_IN_PLACE
    running: pb.RunningRequests.ValueType = pb.RUNNING_REQUESTS_KEEP
    join_seconds: float = 300.0
    """For the trainer to come."""
    deadline_seconds: float = 600.0
    """How long the trainer may send nothing, not even a sign of life."""
    max_errors: int = MAX_ERRORS


class Bridge:
    """One gang and one trainer."""

    def __init__(
        self,
        target: str,
        token: str,
        options: BridgeOptions,
        *,
        layout: Callable[[int], Layout],
        publish: Callable[[pb.GetParameterInfoResponse], None],
    ) -> None:
        """Does nothing yet.

        Args:
            target: host:port of the gang's control port.
            token: the trainer's, which the gang knows.
            options: see there.
            layout: where the gang's ranks are among the trainer's, given how many there are.
            publish: is given what the model is made of, before the trainer is waited for.
        """
        self._target = target
        self._options = options
        self._layout = layout
        self._publish = publish
        self._metadata = metadata(token)
        self._channel = grpc.insecure_channel(target, options=WEIGHT_OPTIONS)
        self._stub = weights_pb2_grpc.WeightServiceStub(self._channel)
        self._ended = threading.Event()
        self._call_under_way: Any = None
        self._errors = 0

    def run(self) -> None:
        """Returns when the trainer has stopped, in order, or end() was called.

        Raises:
            StoppedError: it stopped, or went away, in the middle of a set.
            GangError: the last of too many errors.
            LayoutError: the gang's ranks fit nowhere.
        """
        while not self._ended.is_set():
            try:
                self._exchange()
            except GangError as error:
                if self._ended.is_set():
                    return
                if error.code is grpc.StatusCode.CANCELLED:
                    raise StoppedError(str(error)) from error
                self._errors += 1
                if self._errors >= self._options.max_errors or error.code in _FINAL:
                    raise
                logger.exception("error %d of %d in a row", self._errors, self._options.max_errors)
                self._ended.wait(RETRY_SECONDS)
            else:
                return

    def end(self) -> None:
        """Ends run, and with it what is under way. From any thread."""
        self._ended.set()
        call = self._call_under_way
        if call is not None:
            call.cancel()

    def close(self) -> None:
        """Closes the connection. Idempotent."""
        self._channel.close()

    def _exchange(self) -> None:
        """From the joining to the trainer's end."""
        described = self._call(self._stub.GetParameterInfo, pb.GetParameterInfoRequest(), _CALL_SECONDS)
        tensors = indexed_tensors(described.parameters)
        self._publish(described)
        session = tensors.session = self._join(self._layout(described.world_size))
        logger.info("joined the trainer at %s:%d", self._options.master_address, self._options.master_port)
        while not self._ended.is_set():
            awaiting = pb.AwaitUpdateRequest(tensors=tensors, session=session)
            awaited = self._call(self._stub.AwaitUpdate, awaiting, None)
            if awaited.stopped:
                logger.info("%s", awaited.reason)
                return
            self._update(tensors, session)
            self._errors = 0

    def _join(self, layout: Layout) -> str:
        """Waits for the trainer's store, then for its groups; the session, "" when it was ended meanwhile."""
        options = self._options
        deadline = time.monotonic() + options.join_seconds
        waiting = False
        while True:
            left = deadline - time.monotonic()
            request = pb.InitUpdateRequest(
                master_address=options.master_address,
                master_port=options.master_port,
                rank_offset=layout.first,
                world_size=layout.group_size,
                mode=options.mode,
                timeout_seconds=max(left, 1.0),
                deadline_seconds=options.deadline_seconds,
                transport=pb.UPDATE_TRANSPORT_INDEXED,
                backend=options.backend,
            )
            try:
                return self._call(self._stub.InitUpdate, request, max(left, 1.0) + _CALL_SECONDS).session
            except GangError as error:
                if error.code is not grpc.StatusCode.UNAVAILABLE or left <= 0:
                    raise
                if not waiting:
                    logger.info("waiting for the trainer: %s", error)
                waiting = True
                if self._ended.wait(RETRY_SECONDS):
                    return ""

    def _update(self, tensors: pb.UpdateRequest, session: str) -> None:
        started = time.monotonic()
        start = pb.StartUpdateRequest(running=self._options.running, session=session)
        self._call(self._stub.StartUpdate, start, _FINISH_SECONDS)
        self._call_under_way = call = self._stub.Update(tensors, metadata=self._metadata)
        newest = 0
        with self._failures():
            for response in call:
                newest = response.served.newest_version
        finish = pb.FinishUpdateRequest(version=newest + 1, session=session)
        served = self._call(self._stub.FinishUpdate, finish, 4 * _CALL_SECONDS).served
        logger.info("weights of version %d are served after %.2f s", served.version, time.monotonic() - started)

    def _call(self, method: Any, request: Any, seconds: float | None) -> Any:
        self._call_under_way = call = method.future(request, metadata=self._metadata, timeout=seconds)
        if self._ended.is_set():
            call.cancel()
        with self._failures():
            return call.result()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except grpc.FutureCancelledError as error:
            raise GangError(self._target, grpc.StatusCode.CANCELLED, "the call was cancelled") from error
        except grpc.RpcError as error:
            code = error.code() if isinstance(error, grpc.Call) else grpc.StatusCode.UNKNOWN
            raise GangError(
                self._target, code, str(error.details() if isinstance(error, grpc.Call) else error)
            ) from error
