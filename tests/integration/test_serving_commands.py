"""The commands against one whole server, and what `tpmodel serve` says of what it cannot serve."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tpmodel import Client
from tpmodel.local import LocalServer, ServerFailedError

MODEL = Path(__file__).parents[2] / "examples" / "default_model"
OPTIONS = ["--dtype", "float32", "--kv-cache-memory", "8M", "--log-format", "text"]


@pytest.fixture(scope="module")
def server() -> Iterator[LocalServer]:
    with LocalServer(MODEL, tp=2, device="cpu", options=OPTIONS) as server:
        yield server


def run(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpmodel", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def test_generate_streams_the_text(server: LocalServer) -> None:
    ran = run("generate", "--target", server.target, "Tell me", "--max-tokens", "12", "--temperature", "0")
    with Client(server.target) as client:
        assert ran.stdout == client.complete("Tell me", max_tokens=12, temperature=0).text + "\n"
    assert (ran.returncode, ran.stderr) == (0, "")


def test_generate_prints_one_json_object_a_line(server: LocalServer) -> None:
    ids = [5, 6, 7, 8]
    given = ",".join(map(str, ids))
    ran = run("generate", "--target", server.target, "--token-ids", given, "--max-tokens", "9", "--temperature", "0",
              "--ignore-eos", "--json")  # fmt: skip
    *chunks, end = [json.loads(line) for line in ran.stdout.splitlines()]
    with Client(server.target) as client:
        expected = client.complete(ids, max_tokens=9, temperature=0, ignore_eos=True)
    assert [token for chunk in chunks for token in chunk["token_ids"]] == list(expected.token_ids[0])
    assert "".join(chunk["text"] for chunk in chunks) == expected.text
    assert end["completion"]["usage"]["completion_tokens"] == 9


def test_generate_says_what_the_server_refuses_in_one_line(server: LocalServer) -> None:
    ran = run("generate", "--target", server.target, "hello", "--top-p", "7")
    assert ran.returncode == 1
    assert ran.stdout == ""
    assert ran.stderr == (f"Error: {server.target}: top_p: 7.0 is out of range, accepted: (0, 1] (INVALID_ARGUMENT)\n")


def test_chat_answers_each_line_with_all_that_was_said_before(server: LocalServer) -> None:
    ran = run("chat", "--target", server.target, "--max-tokens", "8", "--temperature", "0", text="hi\nand then?\n")
    assert ran.returncode == 0, ran.stderr
    answers = [line.removeprefix("> ") for line in ran.stdout.splitlines()]
    assert len([answer for answer in answers if answer]) == 2


def test_status_shows_ranks_and_processes(server: LocalServer) -> None:
    ran = run("status", "--target", server.health_target)
    assert ran.returncode == 0
    lines = ran.stdout.splitlines()
    assert lines[0].startswith("default_model: serving, 2 of 2 ranks ready, ")
    assert [line.split()[:3] for line in lines if line[:1].isdigit()] == [
        ["0", "ready", "100%"],
        ["1", "ready", "100%"],
    ]
    for name in ("fork server", "engine", "api 0", "rendezvous", "rank 0", "rank 1"):
        assert any(line.startswith(name) and "running" in line for line in lines), name


def test_status_as_json_has_every_field(server: LocalServer) -> None:
    status = json.loads(run("status", "--target", server.health_target, "--json").stdout)
    assert status["engine"]["phase"] == "PHASE_SERVING"
    assert [rank["rank"] for rank in status["engine"]["ranks"]] == [0, 1]
    assert status["engine"]["running"] == 0


def test_status_of_the_inference_port_names_the_right_one(server: LocalServer) -> None:
    ran = run("status", "--target", server.target)
    assert ran.returncode == 1
    assert "this port does not serve the call" in ran.stderr
    assert "--health-port" in ran.stderr


def test_bench_prints_its_numbers(server: LocalServer) -> None:
    ran = run("bench", "--target", server.target, "--requests", "6", "--concurrency", "3", "--prompt-tokens", "20",
              "--output-tokens", "5")  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("6 requests of 20 + 5 tokens, 3 at once: ")
    assert "output tokens/s" in ran.stdout


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_the_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)


def with_a_broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def with_a_broken_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for x in %}")


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (without_weights, "there is no safetensors file in"),
        (with_half_the_weights, "model.safetensors: truncated: tensor "),
        (with_a_broken_tokenizer, "api 0: "),
        (with_a_broken_template, "api 0: chat template, line 1: "),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_refused_in_one_line_with_64(
    tmp_path: Path, spoil: Callable[[Path], None], cause: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    spoil(folder)
    with pytest.raises(ServerFailedError) as caught:
        LocalServer(folder, tp=1, device="cpu", options=OPTIONS).start()
    assert caught.value.exit_code == 64
    assert caught.value.last_lines[-1].startswith("tpmodel: ended: ")
    assert cause in caught.value.last_lines[-1]
    assert not [line for line in caught.value.last_lines if "Traceback" in line]


@pytest.mark.parametrize("seconds_of_start", [0.7, 1.4, 2.1])
def test_sigterm_while_starting_ends_at_once_with_0(seconds_of_start: float) -> None:
    server = LocalServer(MODEL, tp=2, device="cpu", options=OPTIONS).launch()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            server.wait(seconds_of_start)
        server.process.send_signal(signal.SIGTERM)
        code = server.wait(8)
    finally:
        server.process.kill()
    # Before the supervisor listens to signals, the signal itself ends the process.
    assert code == 0 or (code == -signal.SIGTERM and server.output == "")
