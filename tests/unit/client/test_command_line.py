"""What the commands refuse, before anything runs."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from tpmodel.cli import main
from tpmodel.cli.serve import ByteSize
from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.settings import ServeSettings


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    return result.exit_code, result.output


def test_generate_needs_a_prompt_or_ids() -> None:
    code, output = run("generate")
    assert code == 2
    assert "give either PROMPT or --token-ids" in output


def test_generate_refuses_both_a_prompt_and_ids() -> None:
    assert run("generate", "hello", "--token-ids", "1,2")[0] == 2


@pytest.mark.parametrize("ids", ["1,x", "1,,2", "-1"])
def test_generate_refuses_what_are_no_ids(ids: str) -> None:
    code, output = run("generate", f"--token-ids={ids}")
    assert code == 2
    assert "--token-ids" in output


def test_generate_without_a_server_names_the_target() -> None:
    code, output = run("generate", "--target", "127.0.0.1:1", "--wait", "0.1", "hello")
    assert code == 1
    assert "127.0.0.1:1" in output


def test_serve_refuses_less_than_one_rank(tmp_path: Path) -> None:
    """P2, on the command line."""
    code, output = run("serve", str(tmp_path), "--tp", "0")
    assert code == 2
    assert "--tp" in output


def test_serve_refuses_a_folder_without_config(tmp_path: Path) -> None:
    code, output = run("serve", str(tmp_path))
    assert code == 2
    assert "config.json" in output


def test_serve_refuses_what_is_neither_folder_nor_hub_name() -> None:
    code, output = run("serve", "no-such-folder")
    assert code == 2
    assert "neither a folder nor a hub name" in output


def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(folder)
    for given, name in ((folder, "my-model"), (f"{folder}/", "my-model"), (tmp_path / "link", "link")):
        settings = settings_of("serve", str(given))
        assert (settings.served_name, settings.model_id) == (name, name)
        assert settings.model_path == str(folder)
    settings = settings_of("serve", str(folder), "--served-name", "mine")
    assert (settings.served_name, settings.model_id) == ("mine", "my-model")


def settings_of(*arguments: str) -> ServeSettings:
    """What `tpmodel serve` would run with."""
    given: list[ServeSettings] = []

    def record(settings: ServeSettings) -> int:
        given.append(settings)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tpmodel_worker.supervisor.main.serve", record)
        assert run(*arguments)[0] == 0
    return given[0]


@pytest.mark.parametrize("target", ["", "9000", "localhost", "http://127.0.0.1:8000"])
@pytest.mark.parametrize("command", [["generate", "hello"], ["status"], ["bench"]])
def test_a_target_that_is_no_host_and_port_is_refused(command: list[str], target: str) -> None:
    code, output = run(*command, "--target", target)
    assert code == 2
    assert "is not HOST:PORT" in output


def test_a_port_that_speaks_no_grpc_is_explained() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        code, output = run("status", "--target", f"127.0.0.1:{port}")
        thread.join(10)
    assert code == 1
    assert "that is an HTTP port, give a gRPC one" in output


class HalfUpdated(worker_pb2_grpc.StatusServiceServicer):
    """A gang whose update in place was broken off."""

    def GangStatus(self, request: Any, context: Any) -> worker_pb2.GangStatusResponse:  # noqa: N802
        engine = worker_pb2.EngineState(phase=worker_pb2.PHASE_SERVING, weight_version=41)
        engine.weights_condition, engine.weights_message = "WeightsIncomplete", "send a full set"
        return worker_pb2.GangStatusResponse(engine=engine)


def test_status_names_no_version_of_weights_that_are_not_whole() -> None:
    """E46."""
    server = grpc.server(ThreadPoolExecutor(1))
    worker_pb2_grpc.add_StatusServiceServicer_to_server(HalfUpdated(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        code, output = run("status", "--target", f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()
    assert code == 0
    assert "WeightsIncomplete: send a full set" in output
    assert "version 41" not in output


@pytest.mark.parametrize(
    ("option", "value"), [("--max-model-len", "1"), ("--kv-cache-memory", "much"), ("--port", "70000"), ("--tp", "x")]
)
def test_serve_names_the_option_that_cannot_be(tmp_path: Path, option: str, value: str) -> None:
    code, output = run("serve", str(tmp_path), option, value)
    assert code == 2
    assert option in output


@pytest.mark.parametrize("command", ["serve", "rebuild"])
@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("\n", "the file is empty")])
def test_a_file_without_a_token_is_named(tmp_path: Path, command: str, content: str | None, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    code, output = run(command, *([str(tmp_path)] if command == "serve" else []), "--token-file", str(file))
    assert code == 2
    assert "--token-file" in output
    assert message in output


@pytest.mark.parametrize(
    ("text", "expected"), [("2T", 2 * 10**12), ("500", 500), ("2k", 2000), ("1.5Gi", 3 << 29), ("4 MiB", 4 << 20)]
)
def test_sizes_are_read_with_their_units(text: str, expected: int) -> None:
    assert ByteSize().convert(text, None, None) == expected


def test_serve_makes_its_folder_of_sockets_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings_of("serve", str(tmp_path), "--runtime-dir", "run").runtime_dir == str(tmp_path / "run")


def test_serve_refuses_a_folder_of_sockets_that_is_not_there(tmp_path: Path) -> None:
    code, output = run("serve", str(tmp_path), "--runtime-dir", str(tmp_path / "none"))
    assert code == 2
    assert "--runtime-dir" in output
