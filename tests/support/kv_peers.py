"""Stand-ins for the other gang of a handover: its engine's call and its ranks' ends of the pipes, held where a test
wants them. Between gangs of whole servers a transfer of a small model is over too soon to be met in its middle."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
import torch

from support.handover import TOKEN
from tpmodel.channel import metadata
from tpmodel.local import LocalServer
from tpmodel.v1 import kv_pb2, kv_pb2_grpc
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.kv.layout import KvLayout
from tpmodel_worker.kv.pipe import KvPipe, KvPipeConfig, KvPipeError
from tpmodel_worker.kv.plan import TransferPlan, plan_transfer

HOST = "127.0.0.1"
SECONDS = 30.0


def open_pipe(member: int, port: int, store: Any = None) -> KvPipe:
    """Asks for no item before the one before it was taken."""
    config = KvPipeConfig(
        rank=member,
        address=HOST,
        master_address=HOST,
        base_port=port,
        token=TOKEN,
        receive_limit_bytes=0,
        store_timeout_seconds=SECONDS,
        deadline_seconds=SECONDS,
    )
    return KvPipe(config, store=store)


def layout_of(checkpoint: Path, **changes: Any) -> KvLayout:
    """Of the tests' small model, float32, on one rank."""
    values: dict[str, Any] = {
        "model_id": checkpoint.name,
        "config_digest": hashlib.sha256((checkpoint / "config.json").read_bytes()).hexdigest(),
        "dtype": "float32",
        "layers": 3,
        "kv_heads": 4,
        "head_dim": 16,
        "block_size": 16,
        "ranks": 1,
    }
    return KvLayout(**(values | changes))


class Fetching:
    """A gang of one rank that fetches; a context manager."""

    def __init__(
        self, server: LocalServer, ticket: str, token_ids: Sequence[int], layout: KvLayout, **changes: Any
    ) -> None:
        """changes: fields of FetchKvRequest; token: another one than the gangs'."""
        self.layout = layout
        self._pipes = contextlib.ExitStack()
        self._channel = grpc.insecure_channel(server.control_target)
        stub = kv_pb2_grpc.KvServiceStub(self._channel)
        digest = hashlib.sha256(np.array(token_ids, dtype="<u4").tobytes()).digest()
        token = changes.pop("token", TOKEN)
        values = {"ticket": ticket, "layout": layout.to_message(), "tokens": len(token_ids), "token_digest": digest}
        request = kv_pb2.FetchKvRequest(**(values | changes))
        self.call = stub.Fetch(request, metadata=metadata(token), timeout=60)

    def connect(self) -> list[KvPipe]:
        """The pipes from all ranks of the server, by rank."""
        endpoints = next(self.call).offer.endpoints
        return [self._open(endpoint.port) for endpoint in sorted(endpoints, key=lambda entry: entry.sender)]

    def _open(self, port: int) -> KvPipe:
        pipe = open_pipe(1, port)
        self._pipes.callback(_end, pipe)
        return pipe

    def refusal(self) -> tuple[grpc.StatusCode, str]:
        """How the call ends, without a success."""
        try:
            messages = [message.WhichOneof("response") for message in self.call]
        except grpc.RpcError as error:
            call: Any = error
            return call.code(), call.details() or ""
        raise AssertionError(f"it ended well: {messages}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.call.cancel()
        self._pipes.close()
        self._channel.close()


def _end(pipe: KvPipe) -> None:
    pipe.abort("the test is over")
    with contextlib.suppress(KvPipeError):
        pipe.close()


class Serving:
    """One call of Fetch that a stand-in answers."""

    def __init__(self, request: kv_pb2.FetchKvRequest, plan: TransferPlan, pipes: list[KvPipe]) -> None:
        self.tokens = request.tokens - 1
        self.pipes = pipes
        """To the receivers, by rank."""
        self._plan = plan
        self.gone = threading.Event()
        """The gang that fetches has ended the call."""

    def send_layer(self) -> None:
        """One layer's part to every receiver."""
        for part, pipe in zip(self._plan.parts, self.pipes, strict=True):
            pipe.send(torch.zeros(1, 2, self.tokens, len(part.heads), self._plan.source.head_dim))

    def die(self) -> None:
        """As when all sending processes are killed: the kernel ends their connections."""
        for pipe in self.pipes:
            _end(pipe)


class Keeper(kv_pb2_grpc.KvServiceServicer):
    """A gang of one rank that keeps whatever it is asked for, and sends what the test says."""

    def __init__(self) -> None:
        self._server = grpc.server(ThreadPoolExecutor(4))
        kv_pb2_grpc.add_KvServiceServicer_to_server(self, self._server)
        self.target = f"{HOST}:{self._server.add_insecure_port(f'{HOST}:0')}"
        self._calls: queue.SimpleQueue[Serving] = queue.SimpleQueue()
        self._server.start()

    def next_call(self) -> Serving:
        """Once its pipes are connected."""
        return self._calls.get(timeout=60)

    def Fetch(self, request: kv_pb2.FetchKvRequest, context: grpc.ServicerContext) -> Iterator[Any]:  # noqa: N802
        target = KvLayout.from_message(request.layout)
        source = dataclasses.replace(target, ranks=1)
        plan = plan_transfer(source, target)
        stores = [start_store(HOST) for _ in plan.parts]
        endpoints = [
            kv_pb2.KvEndpoint(
                sender=part.sender, receiver=part.receiver, address=HOST, port=store.port, piece_bytes=1 << 20
            )
            for part, store in zip(plan.parts, stores, strict=True)
        ]
        yield kv_pb2.FetchKvResponse(offer=kv_pb2.KvOffer(layout=source.to_message(), endpoints=endpoints))
        pipes = [open_pipe(0, store.port, store) for store in stores]
        serving = Serving(request, plan, pipes)
        self._calls.put(serving)
        while context.is_active():
            time.sleep(0.02)
        serving.gone.set()
        serving.die()

    def stop(self) -> None:
        self._server.stop(grace=0).wait(10)
