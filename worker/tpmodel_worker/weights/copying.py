"""A rank's part of copying weights from one gang to another: this rank's arena, as it is, to the same rank there.

What goes over the pipe: the arena's manifest, which says what is to come, then the arena's bytes in pieces. The
receiver writes them over the weights that it has. Its manifest says `loading` from before the first byte to the commit,
so that a process that takes this one's place never uses them; this process itself drops them when its epoch ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from google.protobuf.message import DecodeError

from tpmodel.v1 import weights_pb2
from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.arenas.errors import ArenaError
from tpmodel_worker.arenas.keeper import ArenaKeeper
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.handover import Handover, Handovers
from tpmodel_worker.kv.transfer import ReceivingEnd, SendingEnd
from tpmodel_worker.loading.load import LoadedModel, completed_manifest, digest_tensors, manifest_difference
from tpmodel_worker.loading.plan import ArenaPlan, plan_weights
from tpmodel_worker.rank.errors import RequestError
from tpmodel_worker.weights.membership import out_of_order
from tpmodel_worker.weights.persister import Persister

_SENDER, _RECEIVER = 0, 1
_PIECE_BYTES = 16 << 20
_MOST_BYTES = 64 << 20
"""Of a piece that is taken, and of the manifest."""


class WeightCopyError(KvPipeError):
    """What came over the pipe is not the weights that were asked for."""


class Shard(Protocol):
    """Where the model of this rank is."""

    @property
    def loaded(self) -> LoadedModel | None:
        """The model, if there is one."""
        ...

    def replace_weights(self, *, arena: Arena, digest: int, version: int | None) -> None:
        """Notes which arena holds the model's weights now, and what they are."""
        ...


class WeightCopies:
    """Used by the computing thread; the bytes move in threads of their own."""

    def __init__(
        self,
        *,
        rank: int,
        device: torch.device,
        device_id: str,
        address: str,
        arenas: ArenaKeeper,
        shard: Shard,
        transfers: Handovers,
        persister: Persister,
    ) -> None:
        """device_id: of the GPU, "" on CPU; address: IP of this pod.

        transfers: runs the threads; persister: keeps what is committed in files.
        """
        self._rank = rank
        self._device = device
        self._device_id = device_id
        self._address = address
        self._arenas = arenas
        self._shard = shard
        self._transfers = transfers
        self._persister = persister
        self._current: Handover | None = None
        self._overwrites = False
        self._digests: dict[str, int] | None = None
        """Of what has come, and was right."""

    @property
    def unfinished(self) -> bool:
        """Whether the model's weights are of no use, since a copy of others over them was not committed."""
        return self._overwrites

    def superseded(self) -> None:
        """The model has other weights, or is gone: whatever was copied does not matter any more. Idempotent."""
        self._overwrites, self._digests = False, None

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
                self._commit(request.version)
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
        loaded = self._loaded()
        if loaded.weight_version != request.version or self.unfinished:
            held = "none that are whole" if self.unfinished else loaded.weight_version
            raise out_of_order("send", f"version {request.version} of the weights is asked for, this rank has {held}")
        manifest, plan = self._manifest(loaded), plan_weights(loaded.model)
        other = request.send.device_ids[self._rank] if self._rank < len(request.send.device_ids) else ""
        store = start_store(self._address)
        endpoint = weights_pb2.WeightEndpoint(
            address=self._address,
            port=store.port,
            # NCCL refuses two ends on one GPU.
            nccl=bool(self._device_id and other) and self._device_id != other,
        )
        self._current = handover = Handover(request.transfer)

        def job() -> int:
            pipe = handover.open(self._pipe_config(endpoint, _SENDER, request), store)
            with _own_stream(self._device):
                return send_arena(pipe, loaded.arena, manifest, plan.size)

        self._transfers.begin(handover, job)
        return endpoint

    def _receive(self, request: pb.WeightCopyRequest) -> None:
        """Begins to receive over the weights that the model has."""
        loaded = self._loaded()
        wanted, plan = self._manifest(loaded), plan_weights(loaded.model)
        wanted.weight_version = request.version
        self._digests = None
        self._mark_loading(wanted)
        self._current = handover = Handover(request.transfer)
        endpoint = request.receive.endpoint

        def job() -> int:
            pipe = handover.open(self._pipe_config(endpoint, _RECEIVER, request), None)
            with _own_stream(self._device):
                manifest = receive_manifest(pipe, wanted, plan)
                receive_arena(pipe, loaded.arena, plan.size)
                digests = digest_tensors(plan, loaded.arena, lambda *_: handover.check())
            check_digests(digests, manifest)
            self._digests = digests
            return plan.size

        self._transfers.begin(handover, job)

    def _commit(self, version: int) -> None:
        """What has come is the model's from now on, at this version."""
        loaded, digests = self._loaded(), self._digests
        if digests is None:
            raise out_of_order("commit", "no copy of the weights has come")
        committed = completed_manifest(self._manifest(loaded), loaded.arena, digests, version=version)
        self._arenas.update_manifest(committed)
        self.superseded()
        digest = sum(digests.values()) % (1 << 64)
        self._shard.replace_weights(arena=loaded.arena, digest=digest, version=version)
        self._persister.keep(loaded.arena, committed)

    def _pipe_config(
        self, endpoint: weights_pb2.WeightEndpoint, member: int, request: pb.WeightCopyRequest
    ) -> KvPipeConfig:
        return KvPipeConfig(
            rank=member,
            address=self._address,
            master_address=endpoint.address,
            base_port=endpoint.port,
            token=request.key,
            device="cuda" if endpoint.nccl else "cpu",
            local_rank=self._device.index or 0,
            # A piece is read while the one before is on its way, and put in its place while the next one comes.
            send_limit_bytes=_PIECE_BYTES,
            receive_limit_bytes=_PIECE_BYTES,
            max_tensor_bytes=_MOST_BYTES,
            store_timeout_seconds=request.deadline_seconds,
            deadline_seconds=request.deadline_seconds,
        )

    def _mark_loading(self, wanted: pb.ArenaManifest) -> None:
        self._persister.cancel()
        manifest = pb.ArenaManifest()
        manifest.CopyFrom(wanted)
        manifest.state = pb.ARENA_STATE_LOADING
        self._arenas.update_manifest(manifest)
        self._overwrites = True

    def _manifest(self, loaded: LoadedModel) -> pb.ArenaManifest:
        held = self._arenas.fetch(loaded.arena.id)
        if held is None:
            raise ArenaError(f"{loaded.arena.id} is not held by the supervisor any more")
        descriptor, manifest = held
        os.close(descriptor)
        return manifest

    def _loaded(self) -> LoadedModel:
        loaded = self._shard.loaded
        if loaded is None:
            raise RequestError(pb.ERROR_KIND_MODEL_NOT_LOADED, "no model is loaded: LoadDenseShard comes first")
        return loaded


def send_arena(pipe: SendingEnd, arena: Arena, manifest: pb.ArenaManifest, size: int) -> int:
    """Sends the manifest and the first size bytes of the arena; returns these. Raises KvPipeError."""
    pipe.send(torch.frombuffer(bytearray(manifest.SerializeToString()), dtype=torch.uint8))
    for start in range(0, size, _PIECE_BYTES):
        pipe.send(arena.bytes[start : min(start + _PIECE_BYTES, size)])
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
        piece = pipe.receive()
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


@contextlib.contextmanager
def _own_stream(device: torch.device) -> Iterator[None]:
    """Beside the computing thread's: nothing of that is waited for. At the end everything on it is done."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            yield
        stream.synchronize()
