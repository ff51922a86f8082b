"""A whole server whose weights a trainer updates, and requests that run meanwhile."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.checkpoints import make_checkpoint, random_prompts
from support.trainer import TOKEN, TrainedModel
from tpmodel import Client, Result, TpmodelError
from tpmodel.channel import metadata
from tpmodel.local import LocalServer
from tpmodel.trainer import Trainer, connect
from tpmodel.v1 import inference_pb2, inference_pb2_grpc, weights_pb2_grpc, worker_pb2, worker_pb2_grpc
from tpmodel.v1 import weights_pb2 as pb

TOKENS = 24
TOKEN_FILE = "trainer-token"
GREEDY = {"temperature": 0, "ignore_eos": True}
PROMPTS = random_prompts(4, shortest=5, longest=40, vocabulary=512, seed=3)


@dataclass
class Served:
    """A server, and the model that a trainer updates it with."""

    server: LocalServer
    trained: TrainedModel
    checkpoint: Path
    token_file: Path
    version: int = 0
    ranks: int = 1

    def connect(self, **options: Any) -> Trainer:
        return connect(self.server.control_target, token=TOKEN, options={"deadline_seconds": 20, **options})

    def next_version(self) -> int:
        self.version += 1
        return self.version

    def update(self, trainer: Trainer, **arguments: Any) -> None:
        """Trains, and sends a full set."""
        self.trained.train()
        self.send(trainer, **arguments)

    def send(self, trainer: Trainer, **arguments: Any) -> None:
        """Sends a full set."""
        trainer.send_weights(self.named(trainer), version=self.next_version(), **arguments)

    def named(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """The trained weights as the checkpoint names them, which has longer names where it has a vision encoder."""
        if not any(name.startswith("model.language_model.") for name in trainer.parameters):
            return self.trained.weights
        return {
            name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name: tensor
            for name, tensor in self.trained.weights.items()
        }

    def check(self) -> None:
        """Greedy output is that of transformers with the trainer's weights, made with its version."""
        with Client(self.server.target) as client:
            for prompt in PROMPTS:
                result = client.complete(prompt, max_tokens=TOKENS, **GREEDY)
                assert len(result.token_ids[0]) == TOKENS
                assert self.trained.chooses(prompt, list(result.token_ids[0]))
                assert result.completion.weight_versions == (self.version,)

    def cached_tokens(self) -> list[int]:
        """How many tokens of each prompt are not computed again."""
        with Client(self.server.target) as client:
            results = [client.complete(prompt, max_tokens=1, **GREEDY) for prompt in PROMPTS]
        return [result.completion.usage.cached_tokens for result in results]

    def served(self) -> pb.ServedVersion:
        with self.stub() as stub:
            return stub.GetVersion(pb.GetVersionRequest(), metadata=metadata(TOKEN), timeout=10).served

    def stub(self) -> StubContext:
        return StubContext(self.server.control_target)

    def state(self) -> worker_pb2.EngineState:
        return self._status().engine

    def _status(self) -> worker_pb2.GangStatusResponse:
        with grpc.insecure_channel(self.server.health_target) as channel:
            stub = worker_pb2_grpc.StatusServiceStub(channel)
            return stub.GangStatus(worker_pb2.GangStatusRequest(), timeout=10)

    def processes(self) -> list[worker_pb2.ProcessStatus]:
        """Of the server's pod."""
        return list(self._status().processes)

    def is_serving_anew(self, instance_id: str) -> bool:
        """Whether another engine than that one has a world."""
        state = self._status().engine
        return state.instance_id != instance_id and state.phase == worker_pb2.PHASE_SERVING

    def ready(self) -> bool:
        with grpc.insecure_channel(self.server.health_target) as channel:
            request = health_pb2.HealthCheckRequest(service="tpmodel.v1.Ready")
            stub: Any = health_pb2_grpc.HealthStub(channel)
            reply = stub.Check(request, timeout=10)
            return reply.status == health_pb2.HealthCheckResponse.SERVING

    def heal(self) -> None:
        """Whatever a test has left behind, a full set mends it."""
        with self.connect() as trainer:
            self.update(trainer)


class StubContext:
    """A bare stub, for calls that the trainer's side would not make."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)

    def __enter__(self) -> Any:
        return weights_pb2_grpc.WeightServiceStub(self._channel)

    def __exit__(self, *_: object) -> None:
        self._channel.close()


@contextlib.contextmanager
def serve(
    folder: Path,
    tp: int,
    *further: str,
    checkpoint: Path | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Served]:
    """further: options of `tpmodel serve`. The folder may have been served from before.

    environment: further variables of its processes.
    """
    checkpoint = checkpoint or prepare_checkpoint(folder, tp)
    with prepare(folder, tp, *further, checkpoint=checkpoint, environment=environment) as server:
        yield Served(server, TrainedModel(checkpoint), checkpoint, folder / TOKEN_FILE, ranks=tp)


def prepare_checkpoint(folder: Path, tp: int) -> Path:
    """The folder's checkpoint, made once."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, seed=tp)
    return checkpoint


def prepare(
    folder: Path, tp: int, *further: str, checkpoint: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> LocalServer:
    """The server, not started yet."""
    token_file = folder / TOKEN_FILE
    token_file.write_text(f"{TOKEN}\n")
    options = ["--dtype", "float32", "--kv-cache-memory", "8M", "--log-format", "text"]
    options += ["--trainer-token-file", str(token_file), *further]
    # Threads of torch's own that wait for each other are slow where processors are few.
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment)
    return LocalServer(checkpoint, tp=tp, device="cpu", options=options, environment=variables)


class Stream:
    """A greedy request that runs in a thread of its own."""

    def __init__(self, target: str, prompt: list[int], count: int) -> None:
        self.result: Result | None = None
        self.error: TpmodelError | None = None
        self.tokens: list[int] = []
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(target, prompt, count))
        self._thread.start()

    def _run(self, target: str, prompt: list[int], count: int) -> None:
        with Client(target) as client:
            try:
                stream = client.generate(prompt, max_tokens=count, **GREEDY)
                for chunk in stream:
                    self.tokens += chunk.token_ids
                    if len(self.tokens) > 4:
                        self._begun.set()
                self.result = stream.result()
            except TpmodelError as error:
                self.error = error
            finally:
                self._begun.set()

    def begun(self) -> Stream:
        assert self._begun.wait(30)
        return self

    def end(self) -> Stream:
        # Hundreds of steps, on a machine that may be busy with other tests.
        self._thread.join(300)
        assert not self._thread.is_alive()
        return self


def raw_stream(target: str, *, begun: bool = True) -> Future[grpc.StatusCode]:
    """A long request without a client that would try again; how it ends. begun: waits for its first tokens."""
    started = threading.Event()
    ended: Future[grpc.StatusCode] = Future()

    def run() -> None:
        sampling = inference_pb2.SamplingParams(temperature=0, ignore_eos=True, max_tokens=700)
        ids = inference_pb2.TokenIds(ids=PROMPTS[0])
        request = inference_pb2.GenerateRequest(token_ids=ids, sampling=sampling)
        with grpc.insecure_channel(target) as channel:
            try:
                for response in inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60):
                    if response.chunk.token_ids:
                        started.set()
                ended.set_result(grpc.StatusCode.OK)
            except grpc.RpcError as error:
                ended.set_result(error.code())  # pyright: ignore[reportAttributeAccessIssue]
            finally:
                started.set()

    threading.Thread(target=run, daemon=True).start()
    assert not begun or started.wait(30)
    return ended
