"""The ports inside a gang whose numbers nobody knows beforehand: health for anybody, all else with the gang's token."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from support.rank_gang import RankGang
from support.supervised import TOKEN, Supervised, stand_in_settings
from tpmodel_worker.auth import token_metadata


def check(port: int, token: str, service: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        answer = health(health_pb2.HealthCheckRequest(service=""), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflection = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        for metadata in ((), token_metadata("the trainer's"), token_metadata("the clients'")):
            with pytest.raises(grpc.RpcError, match="takes the gang's own token") as refused:
                list(reflection(iter([question]), timeout=10, metadata=metadata))
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]
        (listed,) = reflection(iter([question]), timeout=10, metadata=token_metadata(token))
    assert service in [entry.name for entry in listed.list_services_response.service]


def test_a_rank(tmp_path: Path) -> None:
    gang = RankGang(tmp_path, 1)
    try:
        check(gang.ports[0], gang.token, "tpmodel.v1.WorkerService")
    finally:
        gang.close()


def test_a_supervisor(tmp_path: Path) -> None:
    pod = Supervised(tmp_path, stand_in_settings(tmp_path, runtime_dir=str(tmp_path)))
    pod.start()
    try:
        port = pod.eventually(lambda: pod.events("register"), "a registration")[-1]["supervisor_port"]
        check(port, TOKEN, "tpmodel.v1.SupervisorService")
    finally:
        pod.stop()
