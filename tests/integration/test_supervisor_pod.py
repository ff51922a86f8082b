"""A supervisor with stand-ins for its processes: start, ready line, status, health, metrics, what children get."""

from __future__ import annotations

import json
import os
import stat
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from support.supervised import METADATA, READY_LINE, Supervised, stand_in_settings
from tpmodel.v1 import worker_pb2


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    folder = tmp_path_factory.mktemp("pod")
    pod = Supervised(folder, stand_in_settings(folder, runtime_dir=str(tmp_path_factory.mktemp("run"))))
    pod.steer(script_of_rank_0=[["instance"]])
    pod.start()
    try:
        pod.wait_ready()
        yield pod
    finally:
        pod.stop()


def test_one_line_on_stdout_says_ready(pod: Supervised) -> None:
    found = READY_LINE.findall(pod.output)

    assert len(found) == 1
    host, port, http_host, http_port, model, ranks, _ = found[0]
    assert (host, int(port)) == ("127.0.0.1", pod.port_setting("port"))
    assert (http_host, int(http_port)) == ("127.0.0.1", pod.port_setting("http_port"))
    assert (model, ranks) == ("stand-in", "2")


def test_output_is_labelled_with_the_process(pod: Supervised) -> None:
    """P3: output labelled."""
    assert "[engine] engine speaks on stdout" in pod.output
    assert "[api 0] api speaks on stdout" in pod.output
    assert "[rank 0] rank 0 speaks on stderr" in pod.output
    assert "[rank 1] rank 1 speaks on stderr" in pod.output


def test_a_rank_is_started_for_every_index_and_belongs_to_the_supervisor(pod: Supervised) -> None:
    """P3: a rank for every index."""
    assert sorted(event["rank"] for event in pod.events("rank")) == [0, 1]
    assert {event["parent"] for event in pod.events("rank")} == {pod.pid}


def test_forked_processes_have_no_grpc_and_their_share_of_threads(pod: Supervised) -> None:
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(event["grpc"], event["threads"]) for event in pod.events("rank")] == [(False, threads)] * 2


def test_forked_processes_hold_no_descriptor_of_the_fork_server(pod: Supervised) -> None:
    rank = psutil.Process(pod.pid_of("rank 0"))
    # Standard streams, and the connection to the rank socket.
    assert rank.num_fds() == 4


def test_the_settings_file_with_the_token_is_private(pod: Supervised) -> None:
    path = pod.settings_file()

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    settings = json.loads(path.read_text())
    assert settings["max_model_len"] == 128
    assert all(settings[name] for name in ("port", "http_port", "control_port", "health_port", "metrics_port"))


def test_the_pod_registers_once_with_all_of_its_ranks(pod: Supervised) -> None:
    (event,) = pod.events("register")

    assert event["seen"] == ""
    assert event["rendezvous"] == "127.0.0.1:4000"
    assert event["ranks"] == {"0": pod.pid_of("rank 0"), "1": pod.pid_of("rank 1")}


def test_ranks_are_told_the_engine_instance_that_the_pod_is_registered_with(pod: Supervised) -> None:
    (event,) = pod.eventually(lambda: pod.events("instance"), "instance")
    assert event["instance"] == f"engine of {pod.pid_of('engine')}"


def test_gang_status_shows_engine_and_processes(pod: Supervised) -> None:
    status = pod.gang_status()

    assert status.pod == "local"
    assert status.attempt == 1
    assert status.engine.phase == worker_pb2.PHASE_SERVING
    names = {process.name: process.state for process in status.processes}
    expected = ["fork server", "engine", "api 0", "rendezvous", "rank 0", "rank 1"]
    assert names == dict.fromkeys(expected, "running")


def test_health_answers_alive_and_ready(pod: Supervised) -> None:
    assert pod.health("")
    assert pod.health("tpmodel.v1.Ready")


def test_the_health_port_serves_reflection(pod: Supervised) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{pod.port_setting('health_port')}") as channel:
        ask = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        (answer,) = ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=5)
        assert "tpmodel.v1.StatusService" in {service.name for service in answer.list_services_response.service}


def test_metrics_of_all_processes_are_served(pod: Supervised) -> None:
    url = f"http://127.0.0.1:{pod.port_setting('metrics_port')}/metrics"
    with urllib.request.urlopen(url, timeout=5) as response:
        text = response.read().decode()

    assert "stand_in_api_starts_total 1.0" in text
    assert 'tpmodel_process_up{process="rank 1"} 1.0' in text
    assert 'tpmodel_process_restarts{process="rank 1"} 0.0' in text


def test_the_metrics_port_serves_nothing_else(pod: Supervised) -> None:
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"http://127.0.0.1:{pod.port_setting('metrics_port')}/settings.json", timeout=5)
    assert error.value.code == 404


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer wrong"),)])
def test_the_supervisor_service_refuses_a_wrong_token(pod: Supervised, metadata: tuple[tuple[str, str], ...]) -> None:
    with pod.service() as stub, pytest.raises(grpc.RpcError) as error:
        stub.GetSupervisorStatus(worker_pb2.GetSupervisorStatusRequest(), timeout=5, metadata=metadata)
    assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED  # pyright: ignore[reportAttributeAccessIssue]


def test_watch_begins_with_the_present_state(pod: Supervised) -> None:
    with pod.service() as stub:
        events = stub.Watch(worker_pb2.WatchRequest(), timeout=10, metadata=METADATA)
        seen = {(event.started.rank, event.started.pid, event.started.port) for event in (next(events), next(events))}
        events.cancel()
    assert seen == {(rank, pod.pid_of(f"rank {rank}"), 5000 + rank) for rank in (0, 1)}


def test_a_second_pod_on_the_same_port_is_refused_before_any_process_starts(pod: Supervised, tmp_path: Path) -> None:
    second = Supervised(tmp_path, stand_in_settings(tmp_path, http_port=pod.port_setting("http_port")))
    second.start()

    assert second.wait_exit() == 64
    assert f"--http-port {pod.port_setting('http_port')} is in use" in second.output
    assert second.events("rank") == []
