"""Probes and metrics over HTTP, and what counts as unhealthy."""

import asyncio

import aiohttp

from tpmodel.local import free_ports
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.probes import Health, finished, serving


async def get(port: int, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        return answer.status, await answer.text()


async def test_a_process_without_a_task_yet_is_healthy_and_ready():
    health_port, metrics_port = free_ports(2)
    async with serving(Health(), Metrics(), health_port=health_port, metrics_port=metrics_port):
        assert (await get(health_port, "/healthz"))[0] == 200
        assert (await get(health_port, "/readyz"))[0] == 200


async def test_the_answers_name_what_is_wrong():
    health_port, metrics_port = free_ports(2)
    health = Health()
    health.require_ready(lambda: ["pods are not in yet"])
    async with serving(health, Metrics(), health_port=health_port, metrics_port=metrics_port):
        assert (await get(health_port, "/healthz"))[0] == 200
        assert await get(health_port, "/readyz") == (500, "pods are not in yet\n")
        health.require_alive(lambda: ["the watch is dead"])
        assert await get(health_port, "/healthz") == (500, "the watch is dead\n")


async def test_metrics_are_served():
    health_port, metrics_port = free_ports(2)
    metrics = Metrics()
    metrics.gang_restarts.labels("PodLost").inc()
    metrics.queue_depth.set_function(lambda: 7)
    async with serving(Health(), metrics, health_port=health_port, metrics_port=metrics_port):
        status, text = await get(metrics_port, "/metrics")
    assert status == 200
    assert 'tpmodel_operator_gang_restarts_total{cause="PodLost"} 1.0' in text
    assert "tpmodel_operator_queue_depth 7.0" in text


async def test_a_task_that_has_ended_is_a_failure():
    health = Health()
    forever = asyncio.create_task(asyncio.sleep(60), name="watch of pods")
    health.require_alive(finished(forever))
    assert health.failures() == []
    forever.cancel()
    await asyncio.wait([forever])
    assert health.failures() == ["watch of pods has ended"]
