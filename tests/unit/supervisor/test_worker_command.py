"""tpmodel-worker: from flags, environment and files to settings, and what it says of values that cannot work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor import command
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.engine_options import read_engine_options
from tpmodel_worker.supervisor.hub import ModelSource
from tpmodel_worker.supervisor.main import write_termination_message

POD = {
    "TPMODEL_POD_NAME": "small-0-abc12-1",
    "TPMODEL_POD_UID": "a-uid",
    "TPMODEL_POD_IP": "10.1.2.3",
    "TPMODEL_POD_INDEX": "1",
}
Read = Callable[..., ServeSettings]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, content in {"attempt": "7\n", "token": " secret\n", "api-key": "key\n", "trainer-token": "t\n"}.items():
        (tmp_path / name).write_text(content)
    return [f"--{name}-file={tmp_path / name}" for name in ("attempt", "token", "api-key", "trainer-token")]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """The settings of a command line; raises what refuses it."""
    for name, value in POD.items():
        monkeypatch.setenv(name, value)

    def run(*flags: str) -> ServeSettings:
        found: list[ServeSettings] = []

        def keep(options: dict[str, Any]) -> ServeSettings:
            found.append(original(options))
            raise _EnoughError

        original = command.read_settings
        monkeypatch.setattr(command, "read_settings", keep)
        try:
            command._command.main([*flags], standalone_mode=False)
        except _EnoughError:
            return found[0]
        raise AssertionError("it should have read its settings")

    return run


class _EnoughError(Exception):
    pass


GANG = ["--tensor-parallel-size=4", "--ranks-per-pod=2", "--leader-host=small-0-abc12-0.small-pods.team.svc"]
MOUNTED = ["--model-uri=pvc://models/llama/small", "--model-path=/model/llama/small"]


def test_the_operators_command_line_becomes_settings(read: Read, files: list[str]) -> None:
    settings = read(
        *GANG,
        "--model-uri=hf://org/name",
        "--model-revision=main",
        "--served-name=small",
        "--device=cpu",
        "--dtype=bfloat16",
        "--quantization=none",
        "--max-model-len=4096",
        "--load-format=safetensors",
        "--engine-option=kv_cache_memory=2Gi",
        "--engine-option=prefix_cache=false",
        "--recovery-mode=Restart",
        "--drain-timeout=30",
        "--progress-deadline=300",
        "--init-timeout=90",
        "--cache-dir=/cache",
        "--tls-dir=/etc/tpmodel/tls",
        *files,
    )
    assert settings == ServeSettings(
        model_uri="hf://org/name",
        model_path="",
        model_revision="main",
        model_id="org/name",
        served_name="small",
        dtype="bfloat16",
        max_model_len=4096,
        cache_dir="/cache",
        world_size=4,
        ranks_per_pod=2,
        pod_index=1,
        device="cpu",
        attempt=7,
        gang_dir=files[0].partition("=")[2].removesuffix("/attempt"),
        pod_uid="a-uid",
        pod_name="small-0-abc12-1",
        address="10.1.2.3",
        leader_host="small-0-abc12-0.small-pods.team.svc",
        token="secret",
        trainer_token_file=files[3].partition("=")[2],
        kv_cache_bytes=2 << 30,
        prefix_cache=False,
        host="0.0.0.0",
        api_key="key",
        tls_dir="/etc/tpmodel/tls",
        drain_timeout=30,
        endpoint_propagation=5,
        init_timeout=90,
        progress_deadline=300,
    )
    assert list(settings.ranks_here) == [2, 3]
    assert (settings.pods, settings.leads) == (2, False)


def test_a_pod_with_an_ipv6_address_listens_on_that_family(
    read: Read, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPMODEL_POD_IP", "fd00::7")
    assert read(*GANG, *MOUNTED, *files).host == "::"


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("pvc://claim/path/to/small", "small"),
        ("oci://registry/team/small:v1", "small"),
        ("file:///models/small/", "small"),
    ],
)
def test_a_mounted_model_is_called_as_its_uri_ends(read: Read, files: list[str], uri: str, name: str) -> None:
    settings = read(*GANG, f"--model-uri={uri}", "--model-path=/model", *files)
    assert (settings.model_id, settings.served_name) == (name, name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks-per-pod=3"], "--ranks-per-pod 3: give a divisor of --tensor-parallel-size 4"),
        (["--ranks-per-pod=4"], "--pod-index 1: 4 ranks, 4 in each pod, are pods 0 to 0"),
        (["--leader-host="], "--leader-host is needed in pod 1"),
        (["--token-file="], "--token-file is needed"),
        (["--pod-ip=a-name"], "--pod-ip a-name: give an IP address, not a name"),
        (["--model-path="], "--model-path is needed: the folder where pvc://models/llama/small is mounted"),
        (["--model-uri=hf://org/name"], "--cache-dir is needed to download hf://org/name"),
        (["--token-file=/nowhere/token"], "--token-file /nowhere/token: .*No such file"),
        (["--attempt-file=/dev/null"], "--attempt-file /dev/null: '' is no attempt"),
        (["--attempt-file=/proc/version"], "--attempt-file /proc/version: 'Linux.*' is no attempt"),
        (["--engine-option=speed=11"], "--engine-option speed: there is none of that name, only max_num_seqs, "),
    ],
)
def test_what_cannot_work_is_refused_naming_the_flag_and_a_remedy(
    read: Read, files: list[str], flags: list[str], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _refusal(lambda: read(*GANG, *MOUNTED, *files, *flags))


def _refusal(run: Callable[[], object]) -> None:
    """Unwraps the refusal from what click makes of it."""
    import click

    try:
        run()
    except click.ClickException as error:
        raise ConfigurationError(error.format_message()) from error


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ("max_num_seqs=8", {"max_num_seqs": 8}),
        ("kv_cache_memory=500M", {"kv_cache_bytes": 500_000_000}),
        ("kv_cache_memory=1.5Gi", {"kv_cache_bytes": 3 << 29}),
        ("prefix_cache=true", {"prefix_cache": True}),
        ("state_snapshots=0", {"state_snapshots": 0}),
        ("communicator=gloo", {"communicator": "gloo"}),
        ("step_deadline=7.5", {"step_deadline": 7.5}),
        ("respawn=spare", {"respawn": "spare"}),
        ("rebuild_limit=0", {"rebuild_limit": 0}),
        ("rebuild_wait=90", {"rebuild_wait": 90.0}),
        ("rebuild_stability_window=600", {"rebuild_stability_window": 600.0}),
        ("dummy_seed=0", {"dummy_seed": 0}),
    ],
)
def test_engine_options_are_read(given: str, values: dict[str, object]) -> None:
    assert read_engine_options([given]) == values


@pytest.mark.parametrize(
    "given",
    ["max_num_seqs=0", "max_num_seqs=many", "block_size=257", "kv_cache_memory=lots", "prefix_cache=yes",
     "state_snapshots=-1",
     "communicator=mpi", "step_deadline=0", "step_deadline=nan", "api_processes=65", "respawn=never", "max_num_seqs",
     "rebuild_limit=-1", "rebuild_wait=0", "rebuild_stability_window=long"],
)  # fmt: skip
def test_an_engine_option_with_another_value_is_refused_with_what_to_write(given: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--engine-option {given}: write \w+"):
        read_engine_options([given])


def test_every_option_is_a_setting() -> None:
    from dataclasses import fields

    from tpmodel_worker.supervisor.engine_options import _OPTIONS

    assert {option.setting for option in _OPTIONS.values()} <= {field.name for field in fields(ServeSettings)}


def test_a_refusal_is_one_line_with_64_in_the_termination_message_too(tmp_path: Path) -> None:
    message = tmp_path / "message"
    message.touch()
    environment = os.environ | POD | {"TPMODEL_TERMINATION_LOG": str(message)}
    program = "from tpmodel_worker.supervisor.command import main; main()"
    for flags, line in (
        (["--device=tpu"], "Invalid value for '--device': 'tpu' is not one of 'cpu', 'cuda'."),
        (["--speed=11"], "No such option '--speed'. Did you mean '--served-name'?"),
    ):
        arguments = [*GANG, *MOUNTED, "--token-file=/dev/null", *flags]
        ran = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, timeout=60
        )
        assert (ran.returncode, ran.stdout) == (64, "")
        assert ran.stderr == f"tpmodel-worker: {line}\n"
        assert message.read_text() == line


@pytest.mark.parametrize(
    ("uri", "revision", "source"),
    [
        ("hf://Qwen/Qwen3-8B", "", ModelSource("Qwen", "Qwen3-8B", "main")),
        ("hf://org/name@v1.0", "", ModelSource("org", "name", "v1.0")),
        ("hf://org/name", "refs/pr/1", ModelSource("org", "name", "refs/pr/1")),
        ("hf://org/name@v1", "v1", ModelSource("org", "name", "v1")),
    ],
)
def test_a_hub_uri_names_a_repository_and_perhaps_a_revision(uri: str, revision: str, source: ModelSource) -> None:
    assert ModelSource.parse(uri, revision) == source


@pytest.mark.parametrize(
    ("uri", "revision", "message"),
    [
        ("hf://name", "", "write hf://organisation/name"),
        ("hf://org/../name", "", "write hf://organisation/name"),
        ("hf://org/name@v1", "v2", "hf://org/name@v1 and --model-revision v2 differ"),
    ],
)
def test_another_hub_uri_is_refused(uri: str, revision: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ModelSource.parse(uri, revision)


def test_a_long_cause_is_cut_to_what_kubernetes_keeps_and_between_characters(tmp_path: Path) -> None:
    path = tmp_path / "message"
    path.touch()
    write_termination_message(path, "x" + "ü" * 4000)
    assert path.read_text() == "x" + "ü" * 2047
    write_termination_message(tmp_path / "nowhere", "nobody asked")
    assert not (tmp_path / "nowhere").exists()
