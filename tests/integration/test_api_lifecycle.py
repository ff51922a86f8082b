"""Start, keys, several processes on one port, logs and the end of an api process."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from support.api_process import api_under_test, start_api
from support.scripted_engine import Exchange, ScriptedEngine, replies
from tpmodel.v1 import inference_pb2, inference_pb2_grpc, pod_pb2
from tpmodel_worker.api.engine_link import EngineLink
from tpmodel_worker.api.errors import ApiError

SECONDS = 10.0


async def test_sigterm_finishes_streams_and_takes_no_new_ones() -> None:
    go_on = asyncio.Event()

    async def paused(exchange: Exchange) -> None:
        await exchange.admit()
        await exchange.tokens([5])
        await go_on.wait()
        await exchange.tokens([6], finish=inference_pb2.FINISH_REASON_LENGTH)

    async with api_under_test(paused) as api, grpc.aio.insecure_channel(api.target) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        responses = aiter(stub.Generate(inference_pb2.GenerateRequest(text="hello"), timeout=SECONDS))
        assert (await anext(responses)).chunk.HasField("started")
        api.process.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await anext(aiter(stub.Generate(inference_pb2.GenerateRequest(text="hello"), timeout=SECONDS)))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        go_on.set()
        assert [response async for response in responses][-1].HasField("completion")
        assert await asyncio.wait_for(api.process.wait(), SECONDS) == 0


async def test_sigterm_does_not_wait_for_ever() -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.admit()

    async with api_under_test(silent, drain_timeout=1.0) as api, httpx.AsyncClient(timeout=SECONDS) as http:
        async with grpc.aio.insecure_channel(api.target) as channel:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            responses = aiter(stub.Generate(inference_pb2.GenerateRequest(text="hello"), timeout=SECONDS))
            assert (await anext(responses)).chunk.HasField("started")
            over_http = asyncio.create_task(http.post(f"{api.http}/v1/completions", json={"prompt": "hello"}))
            while len(api.engine.submits) < 2:
                await asyncio.sleep(0.01)
            api.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(api.process.wait(), SECONDS) == 0
            with pytest.raises(grpc.aio.AioRpcError):
                await anext(responses)
            await asyncio.wait([over_http])


async def test_a_key_is_needed_on_both_ports_where_one_is_set() -> None:
    async with api_under_test(replies([5]), api_key="secret", token="the gang's") as api:
        async with grpc.aio.insecure_channel(api.target) as channel, httpx.AsyncClient(base_url=api.http) as http:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            request = inference_pb2.GetModelInfoRequest()
            for metadata in ((), (("authorization", "Bearer the gang's"),), (("authorization", "Bearer trainers'"),)):
                with pytest.raises(grpc.aio.AioRpcError, match="InferenceService takes the API key") as error:
                    await stub.GetModelInfo(request, metadata=metadata)
                assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED
            info = await stub.GetModelInfo(request, metadata=(("authorization", "Bearer secret"),))
            assert info.served_name == "test-model"
            health: Any = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1

            for headers in ({}, {"authorization": "Bearer wrong"}):
                refused = await http.get("/v1/models", headers=headers)
                assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
            assert (await http.get("/v1/models", headers={"authorization": "Bearer secret"})).status_code == 200
            assert (await http.get("/health")).status_code == 200
            assert (await http.get("/metrics")).status_code == 200


async def test_two_processes_share_the_ports_and_the_metrics() -> None:
    async with api_under_test(replies([5])) as api:
        second = await start_api(api.settings, index=1)
        try:
            async with asyncio.timeout(SECONDS):
                while (await api.reports.get()).name != "api 1":
                    pass
                # A connection lands on one of the two; the count covers both.
                for number in range(20):
                    async with httpx.AsyncClient(base_url=api.http) as http:
                        assert (await http.post("/v1/completions", json={"prompt": "hello"})).status_code == 200
                        metrics = (await http.get("/metrics")).text
                        assert f'tpmodel_requests_total{{code="OK",protocol="http"}} {number + 1}.0' in metrics
            assert api.engine.connections == 2
        finally:
            second.terminate()
            await second.wait()


async def test_log_lines_carry_the_request_id() -> None:
    async with api_under_test(replies([5]), log_format="json") as api:
        async with httpx.AsyncClient(base_url=api.http) as http:
            await http.post("/v1/completions", json={"prompt": "hi"}, headers={"x-request-id": "good-one"})
            await http.post("/v1/completions", json={"prompt": "hi", "n": 0}, headers={"x-request-id": "bad-one"})
        api.process.terminate()
        lines = [json.loads(line) for line in (await api.standard_error()).splitlines()]
    by_id = {line["request_id"]: line["message"] for line in lines if "request_id" in line}
    assert by_id["good-one"] == "done: 1 output tokens"
    assert by_id["bad-one"].startswith("INVALID_ARGUMENT: n: 0 is out of range")
    assert "hello" not in str(lines)


async def test_a_checkpoint_that_cannot_be_served_ends_with_64() -> None:
    async with api_under_test(replies([5])) as api:
        config = Path(api.settings.model_path) / "config.json"
        config.write_text(config.read_text().replace('"qwen3"', '"other"'))
        broken = await start_api(api.settings, index=1)
        assert await asyncio.wait_for(broken.wait(), SECONDS) == 64


async def test_a_request_that_nobody_reads_is_cancelled_and_the_link_goes_on(tmp_path: Path) -> None:
    async def floods(exchange: Exchange) -> None:
        await exchange.admit()
        while exchange.submit.request_id == "slow":
            await exchange.tokens([7] * 10)
            await asyncio.sleep(0)
        await exchange.tokens([8], finish=inference_pb2.FINISH_REASON_LENGTH)

    async with ScriptedEngine(tmp_path / "front.sock", floods) as engine:
        link = EngineLink(tmp_path / "front.sock", max_pending_bytes=1000)
        running = asyncio.create_task(link.run())
        while link.state is None:
            await link.wait_for_change()
        slow = pod_pb2.SubmitRequest(request_id="slow", n=1)
        unread = await link.submit(slow)
        await engine.wait_for_cancel(slow.handle)
        with pytest.raises(ApiError, match="reads too slowly"):
            await unread.take()
        quick = await link.submit(pod_pb2.SubmitRequest(request_id="quick", n=1))
        async with asyncio.timeout(SECONDS):
            received: list[int] = []
            while not received:
                received += [token_id for output in await quick.take() for token_id in output.token_ids]
        assert received == [8]
        running.cancel()
        await asyncio.wait([running])
