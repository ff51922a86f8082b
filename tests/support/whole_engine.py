"""A whole engine in the test's own process, and what supervisors and api processes do to it."""

from __future__ import annotations

import json
from pathlib import Path

import grpc

from support.fake_rank import TOKEN, until
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.engine.pool import PoolTimeouts
from tpmodel_worker.engine.requests import Request
from tpmodel_worker.engine.service import Engine
from tpmodel_worker.settings import ServeSettings

TIMEOUTS = PoolTimeouts(drain=0.5, ping=0.3, clear=5.0, shutdown=1.0, close=0.2)
ATTEMPT = 3


def engine_settings(tmp_path: Path) -> ServeSettings:
    """Of an engine of two ranks; a checkpoint without weights."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    (model / "model.safetensors").write_bytes(b"")
    return ServeSettings(
        model_path=str(model),
        model_id="model-1",
        served_name="model",
        dtype="float32",
        max_model_len=256,
        world_size=2,
        attempt=ATTEMPT,
        token=TOKEN,
        control_port=0,
        max_num_seqs=8,
        step_deadline=0.5,
        init_timeout=5.0,
        progress_deadline=5.0,
        runtime_dir=str(tmp_path),
    )


async def register(engine: Engine, request: worker_pb2.RegisterRequest, token: str = TOKEN) -> str:
    """What a supervisor does; returns the engine's instance id."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{engine.control_port}") as channel:
        stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
        response = await stub.Register(request, metadata=token_metadata(token), timeout=5.0)
    return response.instance_id


async def until_phase(engine: Engine, phase: worker_pb2.Phase.ValueType) -> worker_pb2.EngineState:
    """Waits for a phase; the state then."""
    await until(lambda: engine.status.phase == phase)
    return engine.status.state


def request(key: int = 1) -> Request:
    """A hundred tokens."""
    return Request(
        key=(1, key),
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        sampling=worker_pb2.SlotSampling(top_p=1.0, repetition_penalty=1.0, max_tokens=100, logprobs=-1),
    )
