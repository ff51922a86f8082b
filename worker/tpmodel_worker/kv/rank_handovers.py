"""A rank's part of what moves between two gangs: each transfer in a thread of its own, beside the computing one."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence

import torch
from torch._C._distributed_c10d import TCPStore

from tpmodel.v1 import kv_pb2, worker_pb2
from tpmodel_worker.comm.communicator import CommunicatorError
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.handover import Handover
from tpmodel_worker.kv.pipe import KvPipe
from tpmodel_worker.kv.pipe_pool import PipePool
from tpmodel_worker.kv.plan import MOST_PIECE_BYTES, Part, TransferPlan, usual_piece_bytes
from tpmodel_worker.kv.staging import now_on
from tpmodel_worker.kv.transfer import Lane, ReceivingEnd, RequestCache, SendingEnd, receive_cache, send_cache

SENDER, RECEIVER = 0, 1
_JOIN_SECONDS = 10.0
"""Pipes whose other end is silent take a few; a process that ends before its groups are closed is aborted."""
_PIECES_UNDER_WAY = 3
"""One is gathered while another is sent and a third waits behind it; the same where they are put in their place."""
_IN_USE_SECONDS = 5.0
"""How long the end of the transfer before may take here, once the other end knows that everything has arrived."""
_STATE_BYTES = 64 << 20
"""Most of one layer's state, which is sent whole."""


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
        self._pool: PipePool[KvPipe] = PipePool()

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

    def close_pipes(self, reason: str) -> None:
        """Ends the pipes that no transfer uses; returns at once."""
        self._pool.drain(reason)

    def join_pipes(self) -> None:
        """Waits a little for the pipes that have been ended."""
        self._pool.join(_JOIN_SECONDS)

    def new(self, name: str) -> Handover:
        """One that has not begun."""
        return Handover(name, self._pool)

    def begin(self, handover: Handover, job: Callable[[], int]) -> None:
        """Runs its job (Handover.start): it is found by its name, and broken off with all others."""
        with self._lock:
            self._known[handover.name] = handover
        handover.start(job)

    def send(
        self, request: worker_pb2.KvTransferRequest, plan: TransferPlan, cache: RequestCache
    ) -> list[kv_pb2.KvEndpoint]:
        """Begins to send a request's cache, once its receivers connect; where they find this rank.

        Raises:
            CommunicatorError: the address can't be listened on.
        """
        handover = self.new(request.transfer)
        lanes: dict[int, Lane[SendingEnd]] = {}
        stores: dict[int, TCPStore] = {}
        endpoints: list[kv_pb2.KvEndpoint] = []
        try:
            for part in plan.of_sender(self._rank):
                endpoint = self._endpoint(part, request.send.device_ids)
                known = self._pool.take(_peer_of(request.send.world, part.receiver))
                if known is not None:
                    handover.adopt(known)
                    endpoint.pipe, endpoint.open = known.name, True
                    lanes[part.receiver] = Lane(known.pipe, endpoint.piece_bytes)
                else:
                    store = stores[part.receiver] = start_store(self._address)
                    endpoint.pipe, endpoint.port = secrets.token_hex(8), store.port
                endpoints.append(endpoint)
        except CommunicatorError as error:
            handover.give_up(str(error))
            raise
        after = now_on(self._device)

        def job() -> int:
            for endpoint in endpoints:
                if not endpoint.open:
                    pipe = handover.open(
                        self._config(endpoint, SENDER, request.deadline_seconds),
                        stores.pop(endpoint.receiver),
                        name=endpoint.pipe,
                        peer=_peer_of(request.send.world, endpoint.receiver),
                        closes=True,
                    )
                    lanes[endpoint.receiver] = Lane(pipe, endpoint.piece_bytes)
            with handover.stream(self._device, after):
                return send_cache(plan, self._rank, cache, lanes)

        self.begin(handover, job)
        return endpoints

    def receive(self, request: worker_pb2.KvTransferRequest, plan: TransferPlan, cache: RequestCache) -> None:
        """Begins to receive into a request's blocks."""
        handover = self.new(request.transfer)
        endpoints = _endpoints_for(plan.of_receiver(self._rank), request.receive.endpoints)
        after = now_on(self._device)

        def job() -> int:
            lanes: dict[int, Lane[ReceivingEnd]] = {}
            for endpoint in endpoints:
                pipe = self._known_pipe(handover, endpoint) if endpoint.open else None
                if pipe is None:
                    config = self._config(endpoint, RECEIVER, request.deadline_seconds)
                    pipe = handover.open(config, None, name=endpoint.pipe, peer=endpoint.pipe, closes=False)
                lanes[endpoint.sender] = Lane(pipe, endpoint.piece_bytes)
            with handover.stream(self._device, after):
                return receive_cache(plan, self._rank, cache, lanes)

        self.begin(handover, job)

    def moves_by_nccl(self, device_ids: Sequence[str], receiver: int) -> bool:
        """Whether it is so from here to a rank of another gang: between two different GPUs.

        NCCL refuses two ends on one, and the host's memory is there for the rest. device_ids: by rank of that gang.
        """
        other = device_ids[receiver] if receiver < len(device_ids) else ""
        return bool(self._device_id and other) and self._device_id != other

    def pipe_config(
        self,
        member: int,
        meeting: tuple[str, int],
        *,
        nccl: bool,
        token: str,
        piece_bytes: int,
        most_bytes: int,
        seconds: float,
    ) -> KvPipeConfig:
        """This rank's end of a pipe between two gangs.

        Args:
            member: SENDER or RECEIVER.
            meeting: address and port of the sender's store.
            nccl: as moves_by_nccl says; else through the memory of hosts.
            token: what both ends prove to know.
            piece_bytes: of what is usually sent at a time.
            most_bytes: of an item that is no such piece.
            seconds: how long connecting, and one piece, may take.
        """
        return KvPipeConfig(
            rank=member,
            address=self._address,
            master_address=meeting[0],
            base_port=meeting[1],
            token=token,
            device="cuda" if nccl else "cpu",
            local_rank=self._device.index or 0,
            # At the limit one more passes.
            send_limit_bytes=(_PIECES_UNDER_WAY - 1) * piece_bytes,
            receive_limit_bytes=(_PIECES_UNDER_WAY - 1) * piece_bytes,
            max_tensor_bytes=max(piece_bytes, most_bytes),
            store_timeout_seconds=seconds,
            deadline_seconds=seconds,
        )

    def _known_pipe(self, handover: Handover, endpoint: kv_pb2.KvEndpoint) -> KvPipe:
        known = self._pool.take(endpoint.pipe, _IN_USE_SECONDS)
        if known is None:
            # Its end over there breaks with this transfer, so that the next one opens a new one.
            raise KvPipeError(f"the pipe from rank {endpoint.sender} is not open any more: send the request again")
        handover.adopt(known)
        return known.pipe

    def _endpoint(self, part: Part, device_ids: Sequence[str]) -> kv_pb2.KvEndpoint:
        nccl = self.moves_by_nccl(device_ids, part.receiver)
        return kv_pb2.KvEndpoint(
            sender=part.sender,
            receiver=part.receiver,
            address=self._address,
            nccl=nccl,
            piece_bytes=usual_piece_bytes(nccl=nccl),
        )

    def _config(self, endpoint: kv_pb2.KvEndpoint, member: int, seconds: float) -> KvPipeConfig:
        return self.pipe_config(
            member,
            (endpoint.address, endpoint.port),
            nccl=endpoint.nccl,
            token=self._token,
            piece_bytes=endpoint.piece_bytes,
            most_bytes=_STATE_BYTES,
            seconds=seconds,
        )


def _peer_of(world: str, receiver: int) -> str:
    """By what the pipes to a rank of a gang's world are known; "": the gang does not name it, so none is kept."""
    return f"{receiver} of {world}" if world else ""


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
