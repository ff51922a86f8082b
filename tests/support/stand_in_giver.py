"""A gang that gives its weights away, or fails in doing so: what another gang's engine and ranks see of it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import grpc
import torch

from support.rank_link import RankLink
from support.update_ranks import HOST, Rank
from support.waiting import until
from tpmodel.local import free_ports
from tpmodel.v1 import weights_pb2 as pb
from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.auth import weight_copy_key
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.config import KvPipeConfig
from tpmodel_worker.kv.errors import KvPipeError
from tpmodel_worker.kv.pipe import KvPipe
from tpmodel_worker.kv.plan import usual_piece_bytes
from tpmodel_worker.kv.transfer import Lane
from tpmodel_worker.loading.load import completed_manifest, digest_tensors
from tpmodel_worker.loading.plan import plan_weights
from tpmodel_worker.weights.copying import send_arena

Behaviour = Literal["good", "dies", "damaged", "stalls"]


class Giver:
    """One rank's weights at a version, offered on a control port."""

    def __init__(self, rank: Rank, checkpoint: Path, version: int, token: str, behaviour: Behaviour) -> None:
        self.behaviour: Behaviour = behaviour
        self.version = version
        self.token = token
        self.set = pb.WeightSet(
            model_id=checkpoint.name,
            config_digest=hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest(),
            dtype="float32",
            ranks=1,
        )
        assert rank.loaded is not None
        self._arena: Arena = rank.loaded.arena
        self._plan = plan_weights(rank.loaded.model)
        self._manifest = worker_pb2.ArenaManifest(
            id=ArenaId(0, "weights", 0).to_proto(), model_id=checkpoint.name, layout_hash=self._plan.layout_hash
        )
        self.copies: list[str] = []
        """How each has ended."""
        (self.port,) = free_ports(1)
        self.target = f"{HOST}:{self.port}"
        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((self._handler(),))
        assert self._server.add_insecure_port(self.target) == self.port
        self._server.start()

    def _handler(self) -> grpc.GenericRpcHandler:
        """The two calls that a gang makes which copies."""
        get_version = grpc.unary_unary_rpc_method_handler(
            self._get_version,
            request_deserializer=pb.GetVersionRequest.FromString,
            response_serializer=pb.GetVersionResponse.SerializeToString,
        )
        copy_weights = grpc.unary_stream_rpc_method_handler(
            self._copy_weights,
            request_deserializer=pb.CopyWeightsRequest.FromString,
            response_serializer=pb.CopyWeightsResponse.SerializeToString,
        )
        methods: Any = {"GetVersion": get_version, "CopyWeights": copy_weights}
        return grpc.method_handlers_generic_handler("tpmodel.v1.WeightService", methods)

    def _get_version(self, request: pb.GetVersionRequest, context: Any) -> pb.GetVersionResponse:
        if ("authorization", f"Bearer {self.token}") not in context.invocation_metadata():
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call lacks the right bearer token")
        served = pb.ServedVersion(version=self.version, newest_version=self.version)
        return pb.GetVersionResponse(served=served, set=self.set)

    def _copy_weights(self, request: pb.CopyWeightsRequest, context: Any) -> Iterator[pb.CopyWeightsResponse]:
        assert request.version == self.version
        assert request.set == self.set
        store = start_store(HOST)
        yield pb.CopyWeightsResponse(offer=pb.WeightOffer(endpoints=[pb.WeightEndpoint(address=HOST, port=store.port)]))
        config = KvPipeConfig(
            rank=0,
            address=HOST,
            master_address=HOST,
            base_port=store.port,
            token=weight_copy_key(self.token, request.nonce),
            store_timeout_seconds=10,
            deadline_seconds=10,
        )
        try:
            with torch.inference_mode(), KvPipe(config, store=store) as pipe:
                sent = self._send(pipe)
        except KvPipeError as error:
            self.copies.append(str(error))
            context.abort(grpc.StatusCode.ABORTED, str(error))
        else:
            self.copies.append("")
            yield pb.CopyWeightsResponse(sent=pb.WeightsSent(bytes=sent))

    def _send(self, pipe: KvPipe) -> int:
        digests = digest_tensors(self._plan, self._arena, lambda *_: None)
        manifest = completed_manifest(self._manifest, self._arena, digests, version=self.version)
        if self.behaviour == "good":
            return send_arena(Lane(pipe, usual_piece_bytes(nccl=False)), self._arena, manifest, self._plan.size)
        pipe.send(torch.frombuffer(bytearray(manifest.SerializeToString()), dtype=torch.uint8))
        data = self._arena.bytes[: self._plan.size].clone()
        half = data.numel() // 2
        pipe.send(data[:half])
        if self.behaviour == "dies":
            # As when the process is killed: nothing that is queued goes out any more.
            threading.Event().wait(0.2)
            pipe.abort("it was killed")
            raise KvPipeError("it was killed")
        if self.behaviour == "stalls":
            until(lambda: pipe.broken, "whoever copies leaves")
            raise KvPipeError("it has left")
        data[half] ^= 1
        pipe.send(data[half:])
        return self._plan.size

    def stop(self) -> None:
        self._server.stop(0).wait()


@contextlib.contextmanager
def givers(checkpoint: Path, *, version: int, token: str, **behaviours: Behaviour) -> Iterator[dict[str, Giver]]:
    """One of each behaviour, by name, all with the checkpoint's weights."""
    with tempfile.TemporaryDirectory(prefix="tp") as sockets, RankLink(Path(sockets) / "s") as holder:
        with ArenaClient(holder.path) as arenas, contextlib.ExitStack() as stack:
            rank = Rank(checkpoint, arenas, 0, 1)
            found: dict[str, Giver] = {}
            for name, behaviour in behaviours.items():
                found[name] = Giver(rank, checkpoint, version, token, behaviour)
                stack.callback(found[name].stop)
            yield found
