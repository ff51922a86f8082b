"""The engine as its own process: supervisor's socket, control port and front socket around fake ranks."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from support.fake_rank import TOKEN, FakeGang, answers_after, fake_gang, until
from support.simulated_rank import true_outputs
from tpmodel.v1 import inference_pb2, pod_pb2, worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import token_metadata
from tpmodel_worker.framing import frame, read_message
from tpmodel_worker.settings import ServeSettings

START_SECONDS = 30.0


class Supervisor:
    """The supervisor's side of the report socket."""

    def __init__(self) -> None:
        self.states: list[worker_pb2.EngineState] = []
        self.names: set[str] = set()
        self._writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        while (report := await read_message(reader, pod_pb2.ProcessReport)) is not None:
            self.names.add(report.name)
            self.states.append(report.engine_state)
        writer.close()

    @property
    def phase(self) -> worker_pb2.Phase.ValueType:
        return self.states[-1].phase if self.states else worker_pb2.PHASE_UNSPECIFIED

    async def drain(self, seconds: float) -> None:
        assert self._writer is not None
        self._writer.write(frame(pod_pb2.EngineCommand(drain=pod_pb2.DrainCommand(timeout_seconds=seconds))))
        await self._writer.drain()


class EngineProcess:
    """An engine process, registered with fake ranks."""

    def __init__(self, settings: ServeSettings, process: asyncio.subprocess.Process, supervisor: Supervisor) -> None:
        self.settings = settings
        self.process = process
        self.supervisor = supervisor

    @property
    def log(self) -> Path:
        return Path(self.settings.runtime_dir) / "engine.log"

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.settings.control_port}"

    async def register(self, gang: FakeGang) -> None:
        async with grpc.aio.insecure_channel(self.target) as channel:
            stub: worker_pb2_grpc.GangServiceAsyncStub = worker_pb2_grpc.GangServiceStub(channel)
            await stub.Register(gang.registration(), metadata=token_metadata(TOKEN), timeout=5.0)
        await until(lambda: self.supervisor.phase == worker_pb2.PHASE_SERVING, START_SECONDS)

    async def end(self) -> int:
        async with asyncio.timeout(15.0):
            return await self.process.wait()


@pytest.fixture
async def gang() -> AsyncIterator[FakeGang]:
    async with fake_gang(2) as ranks:
        yield ranks


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[EngineProcess]:
    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as reservation:
        reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reservation.bind(("127.0.0.1", 0))
        settings = ServeSettings(
            model_path=str(tmp_path),
            model_id="model-1",
            served_name="model",
            load_format="dummy",
            max_model_len=256,
            max_num_seqs=8,
            world_size=2,
            token=TOKEN,
            control_port=reservation.getsockname()[1],
            runtime_dir=str(tmp_path),
        )
        settings.metrics_dir.mkdir()
        settings_file = tmp_path / "settings.json"
        settings_file.write_text(settings.to_json())
        supervisor = Supervisor()
        server = await asyncio.start_unix_server(supervisor.serve, path=str(settings.report_socket))
        with (tmp_path / "engine.log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tpmodel_worker.engine",
                "--settings-file",
                str(settings_file),
                env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(settings.metrics_dir)},
                stderr=log,
            )
        made = EngineProcess(settings, process, supervisor)
        try:
            await until(lambda: supervisor.phase == worker_pb2.PHASE_FORMING, START_SECONDS)
            yield made
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            server.close()
            print(made.log.read_text())  # shown where the test fails


def submission(handle: int, *, max_tokens: int) -> pod_pb2.FrontRequest:
    submit = pod_pb2.SubmitRequest(
        handle=handle,
        request_id=f"r{handle}",
        prompt_token_ids=range(1, 20),
        sampling=worker_pb2.SlotSampling(
            top_p=1.0, repetition_penalty=1.0, seed=handle, max_tokens=max_tokens, logprobs=-1
        ),
        n=1,
    )
    return pod_pb2.FrontRequest(submit=submit)


async def outputs_until_finished(reader: asyncio.StreamReader, handles: set[int]) -> dict[int, list[int]]:
    """Tokens of each handle, once all have ended."""
    tokens: dict[int, list[int]] = {handle: [] for handle in handles}
    left = set(handles)
    async with asyncio.timeout(20.0):
        while left:
            message = await read_message(reader, pod_pb2.FrontResponse)
            assert message is not None
            for output in message.outputs.outputs:
                assert not output.HasField("error"), output.error.message
                tokens[output.handle] += output.token_ids
                if output.finish_reason != inference_pb2.FINISH_REASON_UNSPECIFIED:
                    left.discard(output.handle)
    return tokens


async def test_requests_are_served_and_the_engine_drains_and_ends(engine: EngineProcess, gang: FakeGang) -> None:
    """P16, and the whole way of a request: api process, scheduler, ranks, and back."""
    await engine.register(gang)
    assert engine.supervisor.names == {"engine"}
    reader, writer = await asyncio.open_unix_connection(str(engine.settings.front_socket))
    for handle in range(1, 21):
        writer.write(frame(submission(handle, max_tokens=10 + handle)))
    tokens = await outputs_until_finished(reader, set(range(1, 21)))
    for handle, received in tokens.items():
        sampling = submission(handle, max_tokens=10 + handle).submit.sampling
        assert received == true_outputs(range(1, 20), sampling, 50)
    writer.write(frame(submission(99, max_tokens=30)))
    await writer.drain()
    gang[0].on["generate_step"] = answers_after(0.01, gang[0].on["generate_step"])
    await until(lambda: engine.supervisor.states[-1].running == 1)
    await engine.supervisor.drain(20.0)
    assert len((await outputs_until_finished(reader, {99}))[99]) == 30
    await until(lambda: engine.supervisor.phase == worker_pb2.PHASE_DRAINED)
    assert [rank.names()[-1] for rank in gang.ranks] == ["shutdown"] * 2
    engine.process.send_signal(signal.SIGTERM)
    assert await engine.end() == 0
    writer.close()


async def test_api_process_that_vanishes_takes_its_requests_with_it(engine: EngineProcess, gang: FakeGang) -> None:
    await engine.register(gang)
    slow = answers_after(0.02, gang[0].on["generate_step"])
    gang[0].on["generate_step"] = slow
    _, writer = await asyncio.open_unix_connection(str(engine.settings.front_socket))
    writer.write(frame(submission(1, max_tokens=200)))
    await until(lambda: engine.supervisor.states[-1].running == 1)
    writer.transport.abort()
    await until(lambda: engine.supervisor.states[-1].running == 0)
    assert engine.supervisor.states[-1].kv_blocks_used == 0
    await until(lambda: any(plan.generate_step.releases for plan in gang[1].plans()))


async def test_sigterm_ends_a_serving_engine_at_once_with_goodbyes(engine: EngineProcess, gang: FakeGang) -> None:
    """P16."""
    await engine.register(gang)
    engine.process.send_signal(signal.SIGTERM)
    assert await engine.end() == 0
    assert [rank.names()[-1] for rank in gang.ranks] == ["shutdown"] * 2


async def test_interrupt_of_the_terminal_is_left_to_the_supervisor(engine: EngineProcess) -> None:
    engine.process.send_signal(signal.SIGINT)
    await asyncio.sleep(0.3)
    assert engine.process.returncode is None


async def test_metrics_reach_the_files_of_the_pod(engine: EngineProcess, gang: FakeGang) -> None:
    await engine.register(gang)
    reader, writer = await asyncio.open_unix_connection(str(engine.settings.front_socket))
    writer.write(frame(submission(1, max_tokens=12)))
    await outputs_until_finished(reader, {1})
    await asyncio.sleep(0.3)
    writer.close()
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(engine.settings.metrics_dir))
    value = registry.get_sample_value
    assert value("tpmodel_generated_tokens_total") == 12
    assert value("tpmodel_prompt_tokens_total") == 19
    assert value("tpmodel_epoch") == (1 << 32) | 1
    assert value("tpmodel_requests_running") == 0
    for name in ("tpmodel_step_seconds_count", "tpmodel_plan_seconds_count", "tpmodel_plan_bytes_count"):
        assert value(name), name
    for name in ("kv_cache_usage_ratio", "requests_waiting", "prefix_cache_queries_total", "preemptions_total"):
        assert value(f"tpmodel_{name}") is not None, name


async def test_control_port_answers_health_without_and_reflection_only_with_the_token(engine: EngineProcess) -> None:
    async with grpc.aio.insecure_channel(engine.target) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = await check(health_pb2.HealthCheckRequest(service="tpmodel.v1.GangService"), timeout=5.0)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            # Without a message: writing one into a call that is being refused fails in a way of its own.
            await reflection(timeout=5.0).read()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_logs_are_json_and_carry_epoch(engine: EngineProcess, gang: FakeGang) -> None:
    await engine.register(gang)
    lines = [json.loads(line) for line in engine.log.read_text().splitlines() if line.startswith("{")]
    serving = next((line for line in lines if line["message"].startswith("serving model on 2 ranks")), None)
    assert serving is not None
    assert serving["epoch"] == (1 << 32) | 1
    assert serving["process"] == "engine"
