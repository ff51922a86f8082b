"""A rank's part of copying weights from one gang to another: this rank's arena, as it is, to the same rank there.

What goes over the pipe: the arena's manifest, which says what is to come, then the arena's bytes in pieces. The
receiver writes them over the weights that it has. Its manifest says `loading` from before the first byte to the commit,
so that a process that takes this one's place never uses them; this process itself drops them when its epoch ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.addresses import join_host_port
from tpmodel_worker.arenas.keeper import ArenaKeeper, manifest_of
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.handover import Handover
from tpmodel_worker.kv.plan import usual_piece_bytes
from tpmodel_worker.kv.rank_handovers import RECEIVER, SENDER, Handovers
from tpmodel_worker.kv.staging import now_on
from tpmodel_worker.kv.transfer import Lane, ReceivingEnd, SendingEnd
from tpmodel_worker.loading.digest import shard_digest
from tpmodel_worker.loading.load import LoadedModel, completed_manifest, digest_tensors, manifest_difference
from tpmodel_worker.loading.plan import ArenaPlan, plan_weights
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.held import Shard
from tpmodel_worker.weights.membership import out_of_order
from tpmodel_worker.weights.persister import Persister

_MANIFEST_BYTES = 64 << 20
"""Most of a manifest, which is sent whole."""


class WeightCopyError(KvPipeError):
    """What came over the pipe is not the weights that were asked for."""


@dataclass(frozen=True, slots=True)
class _Received:
    """What has come, and was right."""

    transfer: str
    version: int
    digests: dict[str, int]


class WeightCopies:
    """Used by the computing thread; the bytes move in threads of their own."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        address: str,
        arenas: ArenaKeeper,
        shard: Shard,
        transfers: Handovers,
        persister: Persister,
        updating: Callable[[], bool],
    ) -> None:
        """address: IP of this pod.

        transfers: runs the threads; persister: keeps what is committed in files; updating: whether a trainer's update
        has the weights.
        """
        self._rank = rank
        self._device = device
        self._address = address
        self._arenas = arenas
        self._shard = shard
        self._transfers = transfers
        self._persister = persister
        self._updating = updating
        self._current: Handover | None = None
        self._received: _Received | None = None
        self._overwritten: Arena | None = None
        """What it held before is gone, and nothing whole has come in its place."""

    @property
    def unfinished(self) -> bool:
        """Whether the model's weights are of no use, since a copy of others over them was not committed."""
        loaded = self._shard.loaded
        return loaded is not None and loaded.arena is self._overwritten

    def superseded(self) -> None:
        """Others fill the memory now, or it is gone: whatever was copied does not matter any more. Idempotent."""
        self._overwritten = self._received = None

    def execute(self, request: pb.WeightCopyRequest) -> pb.WeightCopyOk:
        """Takes one step.

        Raises:
            RequestError: it is not due, or this rank does not have the version.
            ArenaError: the supervisor does not hold the weights any more.
            CommunicatorError: the address can't be listened on.
        """
        ok = pb.WeightCopyOk()
        match request.WhichOneof("role"):
            case "send":
                ok.endpoint.CopyFrom(self._send(request))
            case "receive":
                self._receive(request)
            case "commit":
                self._commit(request)
            case None:
                raise RequestError(pb.ERROR_KIND_UNKNOWN_OP, "the copy of weights has no role that this rank knows")
        return ok

    def leave(self, reason: str) -> None:
        """Nothing reads or writes the weights any more. Raises RequestError where the thread does not end."""
        current, self._current = self._current, None
        if current is None:
            return
        current.cancel(reason)
        if not current.wait():
            raise RequestError(pb.ERROR_KIND_INTERNAL, f"{reason}, but the thread of a copy of weights does not end")

    def _send(self, request: pb.WeightCopyRequest) -> weights_pb2.WeightEndpoint:
        """Begins to send, once the other rank connects; where it finds this one."""
        self._check_idle("send")
        loaded = self._loaded()
        if loaded.weight_version != request.version or self.unfinished:
            whole = loaded.weight_version is not None and not self.unfinished
            held = loaded.weight_version if whole else "none that are whole"
            raise out_of_order("send", f"version {request.version} of the weights is asked for, this rank has {held}")
        manifest, plan = manifest_of(self._arenas, loaded.arena), plan_weights(loaded.model)
        store = start_store(self._address)
        endpoint = weights_pb2.WeightEndpoint(
            address=self._address,
            port=store.port,
            nccl=self._transfers.moves_by_nccl(request.send.device_ids, self._rank),
        )
        self._current = handover = self._transfers.new(request.transfer)
        after = now_on(self._device)

        def job() -> int:
            config = self._pipe_config(endpoint, SENDER, request)
            pipe = handover.open(config, store, name=_name_of(endpoint), peer="", closes=True)
            with handover.stream(self._device, after):
                lane = Lane(pipe, usual_piece_bytes(nccl=endpoint.nccl))
                return send_arena(lane, loaded.arena, manifest, plan.size)

        self._transfers.begin(handover, job)
        return endpoint

    def _receive(self, request: pb.WeightCopyRequest) -> None:
        """Begins to receive over the weights that the model has."""
        self._check_idle("receive")
        loaded, endpoint = self._loaded(), request.receive.endpoint
        wanted, plan = manifest_of(self._arenas, loaded.arena), plan_weights(loaded.model)
        self._mark_loading(loaded, wanted)
        wanted.weight_version = request.version
        self._current = handover = self._transfers.new(request.transfer)
        after = now_on(self._device)

        def job() -> int:
            config = self._pipe_config(endpoint, RECEIVER, request)
            pipe = handover.open(config, None, name=_name_of(endpoint), peer="", closes=False)
            with handover.stream(self._device, after):
                manifest = receive_manifest(pipe, wanted, plan)
                receive_arena(pipe, loaded.arena, plan.size)
                digests = digest_tensors(plan, loaded.arena, lambda *_: handover.check())
            check_digests(digests, manifest)
            self._received = _Received(request.transfer, request.version, digests)
            return plan.size

        self._transfers.begin(handover, job)

    def _commit(self, request: pb.WeightCopyRequest) -> None:
        """What has come is the model's from now on, at its version."""
        self._check_idle("commit")
        loaded, received = self._loaded(), self._received
        if not self.unfinished or received is None:
            raise out_of_order("commit", "no copy of the weights has come")
        if (received.transfer, received.version) != (request.transfer, request.version):
            what = f"version {received.version} has come by {received.transfer!r}"
            raise out_of_order("commit", f"version {request.version} by {request.transfer!r} is asked for, {what}")
        committed = completed_manifest(
            manifest_of(self._arenas, loaded.arena), loaded.arena, received.digests, version=received.version
        )
        self._arenas.update_manifest(committed)
        self.superseded()
        digest = shard_digest(received.digests)
        self._shard.replace_weights(arena=loaded.arena, digest=digest, version=received.version)
        self._persister.keep(loaded.arena, committed)

    def _pipe_config(
        self, endpoint: weights_pb2.WeightEndpoint, member: int, request: pb.WeightCopyRequest
    ) -> KvPipeConfig:
        return self._transfers.pipe_config(
            member,
            (endpoint.address, endpoint.port),
            nccl=endpoint.nccl,
            token=request.key,
            piece_bytes=usual_piece_bytes(nccl=endpoint.nccl),
            most_bytes=_MANIFEST_BYTES,
            seconds=request.deadline_seconds,
        )

    def _check_idle(self, step: str) -> None:
        if self._current is not None and not self._current.outcome.done():
            raise out_of_order(step, "a copy of the weights is under way")
        if self._updating():
            raise out_of_order(step, "a weight update is under way")

    def _mark_loading(self, loaded: LoadedModel, held: pb.ArenaManifest) -> None:
        """From now on no process uses what is in the memory."""
        self._persister.cancel()
        self._received = None
        manifest = pb.ArenaManifest()
        manifest.CopyFrom(held)
        manifest.state = pb.ARENA_STATE_LOADING
        self._arenas.update_manifest(manifest)
        self._overwritten = loaded.arena

    def _loaded(self) -> LoadedModel:
        loaded = self._shard.loaded
        if loaded is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "no model is loaded: LoadDenseShard comes first")
        return loaded


def send_arena(lane: Lane[SendingEnd], arena: Arena, manifest: pb.ArenaManifest, size: int) -> int:
    """Sends the manifest and the first size bytes of the arena; returns these. Raises KvPipeError."""
    lane.end.send(torch.frombuffer(bytearray(manifest.SerializeToString()), dtype=torch.uint8))
    for start in range(0, size, lane.piece_bytes):
        piece = arena.bytes[start : min(start + lane.piece_bytes, size)]
        with lane.end.sending((piece.numel(),), torch.uint8) as memory:
            memory.copy_(piece)
    return size


def receive_manifest(pipe: ReceivingEnd, wanted: pb.ArenaManifest, plan: ArenaPlan) -> pb.ArenaManifest:
    """What is about to come, which is what is wanted. Raises WeightCopyError, KvPipeError."""
    sent = pipe.receive()
    if sent is None or sent.dtype != torch.uint8:
        raise WeightCopyError("the other rank did not say what it sends")
    try:
        manifest = pb.ArenaManifest.FromString(sent.cpu().numpy().tobytes())
    except DecodeError as error:
        raise WeightCopyError(f"the other rank did not say what it sends: {error}") from error
    reason = manifest_difference(wanted, manifest, plan)
    if reason is None and manifest.state != pb.ARENA_STATE_COMPLETE:
        reason = f"its state is {pb.ArenaState.Name(manifest.state)}"
    if reason is None and manifest.weight_version != wanted.weight_version:
        reason = f"it has version {manifest.weight_version}, wanted {wanted.weight_version}"
    if reason is not None:
        raise WeightCopyError(f"the other rank's weights are others: {reason}")
    return manifest


def receive_arena(pipe: ReceivingEnd, arena: Arena, size: int) -> None:
    """Fills the first size bytes of the arena. Raises WeightCopyError, KvPipeError."""
    done = 0
    while done < size:
        with pipe.receiving() as piece:
            if piece is None or piece.dtype != torch.uint8 or piece.dim() != 1 or not 0 < piece.numel() <= size - done:
                what = "nothing" if piece is None else f"{tuple(piece.shape)} of {piece.dtype}"
                raise WeightCopyError(f"the other rank sent {what} where {size - done} bytes of weights are due")
            arena.bytes[done : done + piece.numel()].copy_(piece)
            done += piece.numel()


def check_digests(digests: dict[str, int], manifest: pb.ArenaManifest) -> None:
    """Compares what has come with what the manifest says of every tensor. Raises WeightCopyError."""
    recorded = {entry.name: entry.digest for entry in manifest.digests}
    changed = [name for name, digest in digests.items() if recorded.get(name) != digest]
    if changed:
        raise WeightCopyError(f"tensor {changed[0]} is not what the other gang committed")


def _name_of(endpoint: weights_pb2.WeightEndpoint) -> str:
    return f"weights at {join_host_port(endpoint.address, endpoint.port)}"
