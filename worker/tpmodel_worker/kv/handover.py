"""A rank's part of handing requests over to another gang: each in a thread of its own, beside the computing one."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.pipe import KvPipe
from tpmodel_worker.kv.plan import GLOO_PIECE_BYTES, MOST_PIECE_BYTES, NCCL_PIECE_BYTES, Part, TransferPlan
from tpmodel_worker.kv.staging import now_on
from tpmodel_worker.kv.transfer import Lane, ReceivingEnd, RequestCache, SendingEnd, receive_cache, send_cache

_JOIN_SECONDS = 10.0
_SENDER, _RECEIVER = 0, 1
_PIECES_UNDER_WAY = 3
"""One is gathered while another is sent and a third waits behind it; the same where they are put in their place."""
_STATE_BYTES = 64 << 20
"""Most of one layer's state, which is sent whole."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a rank's part has ended."""

    error: str
    """Empty: everything has arrived."""
    bytes: int
    seconds: float


class Handover:
    """One request's transfer on this rank, until its thread has ended. Methods from any thread."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.outcome: Future[Outcome] = Future()
        # From here on nobody who waits for it can cancel it.
        self.outcome.set_running_or_notify_cancel()
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        self._reason = ""
        self._pipes: list[KvPipe] = []
        self._thread: threading.Thread | None = None

    def start(self, job: Callable[[], int]) -> None:
        """Runs job, which returns the bytes that it has moved, and closes the pipes that it has opened."""
        self._thread = threading.Thread(target=self._run, args=(job,), name=f"handover {self.name}", daemon=True)
        self._thread.start()

    def open(self, config: KvPipeConfig, store: TCPStore | None) -> KvPipe:
        """A pipe that cancel breaks off. Raises KvPipeError."""
        pipe = KvPipe(config, store=store, cancelled=self._cancelled)
        with self._lock:
            self._pipes.append(pipe)
        if self._cancelled.is_set():
            pipe.abort(self._reason)
        return pipe

    def cancel(self, reason: str) -> None:
        """Breaks it off; the thread ends soon after. Idempotent."""
        self._reason = self._reason or reason
        self._cancelled.set()
        with self._lock:
            pipes = list(self._pipes)
        for pipe in pipes:
            pipe.abort(reason)

    def wait(self) -> bool:
        """Waits for the end of one that was cancelled; False when it does not come."""
        if self._thread is not None:
            self._thread.join(_JOIN_SECONDS)
        return self._thread is None or not self._thread.is_alive()

    def _run(self, job: Callable[[], int]) -> None:
        started = time.perf_counter()
        error, moved = "", 0
        try:
            # The cache is inference tensors: they may be written in this mode only, which belongs to a thread.
            with torch.inference_mode():
                moved = job()
            for pipe in self._pipes:
                pipe.close()
        except (KvPipeError, CommunicatorError) as failure:
            error = self._reason or str(failure)
            _logger.warning("handover %s: %s", self.name, error)
        except Exception as failure:  # The boundary: the engine gets it.
            error = f"{type(failure).__name__}: {failure}"
            _logger.exception("handover %s failed", self.name)
        if error:
            self.cancel(error)
            for pipe in self._pipes:
                with contextlib.suppress(KvPipeError):
                    pipe.close()
        self.outcome.set_result(Outcome(error, moved, time.perf_counter() - started))


class Handovers:
    """All of a rank. Begun and left by the computing thread; the rest from any thread."""

    def __init__(self, *, rank: int, device: torch.device, device_id: str, address: str, token: str) -> None:
        """device_id: of the GPU, "" on CPU; address: IP of this pod; token: the gang's."""
        self._rank = rank
        self._device = device
        self._device_id = device_id
        self._address = address
        self._token = token
        self._lock = threading.Lock()
        self._known: dict[str, Handover] = {}

    def find(self, name: str) -> Handover | None:
        """The one of that name, also after its end; None: there is none, or it was forgotten."""
        with self._lock:
            return self._known.get(name)

    def forget(self, name: str) -> None:
        """Its end was told."""
        with self._lock:
            self._known.pop(name, None)

    def cancel_all(self, reason: str) -> None:
        """Breaks all of them off."""
        with self._lock:
            known = list(self._known.values())
        for handover in known:
            handover.cancel(reason)

    def leave(self, reason: str) -> bool:
        """Nothing reads or writes the cache any more once this has returned True."""
        self.cancel_all(reason)
        with self._lock:
            known, self._known = list(self._known.values()), {}
        ended = [handover.wait() for handover in known]
        return all(ended)

    def send(
        self, request: worker_pb2.KvTransferRequest, plan: TransferPlan, cache: RequestCache
    ) -> list[kv_pb2.KvEndpoint]:
        """Begins to send a request's cache, once its receivers connect; where they find this rank.

        Raises:
            CommunicatorError: the address can't be listened on.
        """
        handover = Handover(request.transfer)
        parts = plan.of_sender(self._rank)
        stores = {part.receiver: start_store(self._address) for part in parts}
        endpoints = [self._endpoint(part, stores[part.receiver].port, request.send.device_ids) for part in parts]
        after = now_on(self._device)

        def job() -> int:
            lanes: dict[int, Lane[SendingEnd]] = {}
            for endpoint in endpoints:
                config = self._config(endpoint, _SENDER, request.deadline_seconds)
                pipe = handover.open(config, stores.pop(endpoint.receiver))
                lanes[endpoint.receiver] = Lane(pipe, endpoint.piece_bytes)
            with self._stream(after):
                return send_cache(plan, self._rank, cache, lanes)

        self._begin(handover, job)
        return endpoints

    def receive(self, request: worker_pb2.KvTransferRequest, plan: TransferPlan, cache: RequestCache) -> None:
        """Begins to receive into a request's blocks."""
        handover = Handover(request.transfer)
        endpoints = _endpoints_for(plan.of_receiver(self._rank), request.receive.endpoints)
        after = now_on(self._device)

        def job() -> int:
            lanes: dict[int, Lane[ReceivingEnd]] = {}
            for endpoint in endpoints:
                config = self._config(endpoint, _RECEIVER, request.deadline_seconds)
                lanes[endpoint.sender] = Lane(handover.open(config, None), endpoint.piece_bytes)
            with self._stream(after):
                return receive_cache(plan, self._rank, cache, lanes)

        self._begin(handover, job)

    def _begin(self, handover: Handover, job: Callable[[], int]) -> None:
        with self._lock:
            self._known[handover.name] = handover
        handover.start(job)

    def _endpoint(self, part: Part, port: int, device_ids: Sequence[str]) -> kv_pb2.KvEndpoint:
        nccl = _moves_by_nccl(self._device_id, device_ids, part.receiver)
        return kv_pb2.KvEndpoint(
            sender=part.sender,
            receiver=part.receiver,
            address=self._address,
            port=port,
            nccl=nccl,
            piece_bytes=NCCL_PIECE_BYTES if nccl else GLOO_PIECE_BYTES,
        )

    def _config(self, endpoint: kv_pb2.KvEndpoint, member: int, seconds: float) -> KvPipeConfig:
        return KvPipeConfig(
            rank=member,
            address=self._address,
            master_address=endpoint.address,
            base_port=endpoint.port,
            token=self._token,
            device="cuda" if endpoint.nccl else "cpu",
            local_rank=self._device.index or 0,
            # At the limit one more passes.
            send_limit_bytes=(_PIECES_UNDER_WAY - 1) * endpoint.piece_bytes,
            receive_limit_bytes=(_PIECES_UNDER_WAY - 1) * endpoint.piece_bytes,
            max_tensor_bytes=max(endpoint.piece_bytes, _STATE_BYTES),
            store_timeout_seconds=seconds,
            deadline_seconds=seconds,
        )

    @contextlib.contextmanager
    def _stream(self, after: torch.cuda.Event | None) -> Iterator[None]:
        """A stream of its own behind that; at the end everything on it is done."""
        if after is None:
            yield
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(after)
                yield
            stream.synchronize()


def _moves_by_nccl(own: str, others: Sequence[str], receiver: int) -> bool:
    """Between two different GPUs. NCCL refuses two ends on one, and the host's memory is there for the rest."""
    other = others[receiver] if receiver < len(others) else ""
    return bool(own and other) and own != other


def _endpoints_for(parts: Sequence[Part], endpoints: Sequence[kv_pb2.KvEndpoint]) -> list[kv_pb2.KvEndpoint]:
    """Those of the parts, in the order in which the pipes are opened on both sides: by sender, then by receiver.

    Raises:
        ValueError: one is missing, or its pieces are of no sensible size.
    """
    known = {(endpoint.sender, endpoint.receiver): endpoint for endpoint in endpoints}
    missing = [part for part in parts if (part.sender, part.receiver) not in known]
    if missing:
        raise ValueError(f"rank {missing[0].sender} of the other gang does not say where it waits")
    wanted = [known[part.sender, part.receiver] for part in parts]
    for endpoint in wanted:
        if not 0 < endpoint.piece_bytes <= MOST_PIECE_BYTES:
            raise ValueError(
                f"rank {endpoint.sender} of the other gang sends pieces of {endpoint.piece_bytes} bytes: expected 1 to"
                f" {MOST_PIECE_BYTES}"
            )
    return wanted
