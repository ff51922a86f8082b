"""What a supervisor checks and makes before any process starts."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from support.supervised import stand_in_settings
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.configuration import ConfigurationError, check_devices, check_model, check_options
from tpmodel_worker.supervisor.runtime import RuntimeFolderError, runtime_folder, write_settings_file


def test_more_ranks_than_cuda_devices_are_refused_with_both_numbers(tmp_path: Path) -> None:
    """P2."""
    settings = stand_in_settings(tmp_path, device="cuda", world_size=4)
    with pytest.raises(ConfigurationError, match="--tp 4: more ranks than the 2 CUDA devices here"):
        check_devices(settings, count_devices=lambda: 2)
    check_devices(settings, count_devices=lambda: 4)


@pytest.mark.parametrize("setting", ["kv_sources", "weights_from"])
@pytest.mark.parametrize("source", ["nonsense", "10.0.0.7", ":9001", "10.0.0.7:port", "10.0.0.7:0", "10.0.0.7:70000"])
def test_what_another_gang_may_be_asked_for_has_to_be_at_an_address(tmp_path: Path, setting: str, source: str) -> None:
    flag = {"kv_sources": "--kv-from", "weights_from": "--weights-from"}[setting]
    with pytest.raises(ConfigurationError, match=f"{flag} {source}: HOST:PORT is needed"):
        check_options(stand_in_settings(tmp_path, **{setting: ("10.0.0.7:9001", source)}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b" \n", "the file is empty"),
        (b"two\nlines", "one line of printable ASCII"),
        (b"\xff", "invalid start byte"),
        (b"the gang's\n", "it holds the gang's own token as well: give trainers another"),
        (b"clients'", "it holds the clients' API key as well"),
    ],
)
def test_what_cannot_be_the_trainers_token_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "trainer-token"
    if content is not None:
        file.write_bytes(content)
    settings = stand_in_settings(tmp_path, token="the gang's", api_key="clients'", trainer_token_file=str(file))
    with pytest.raises(ConfigurationError, match=f"--trainer-token-file {file}: .*{message}"):
        check_options(settings)


def test_only_the_ranks_of_this_pod_need_devices(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, device="cuda", world_size=4, ranks_per_pod=2, pod_index=1)
    check_devices(settings, count_devices=lambda: 2)
    with pytest.raises(ConfigurationError, match="--ranks-per-pod 2: more ranks than the 1 CUDA devices here"):
        check_devices(settings, {"ranks_per_pod": "--ranks-per-pod"}, count_devices=lambda: 1)


def test_the_refusal_of_too_many_ranks_names_the_option_that_lets_them_share(tmp_path: Path) -> None:
    """P2."""
    settings = stand_in_settings(tmp_path, device="cuda", world_size=4)
    with pytest.raises(ConfigurationError, match="2 CUDA devices here; --share-devices lets them share"):
        check_options(settings, count_devices=lambda: 2)


def test_no_option_lets_ranks_share_a_device_that_is_not_there(tmp_path: Path) -> None:
    """P2."""
    settings = stand_in_settings(tmp_path, device="cuda", world_size=2, share_devices=True)
    with pytest.raises(ConfigurationError, match=r"--tp 2: more ranks than the 0 CUDA devices here$"):
        check_options(settings, count_devices=lambda: 0)


def test_ranks_that_share_a_device_talk_through_gloo(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, device="cuda", world_size=4, share_devices=True)
    assert check_options(settings, count_devices=lambda: 1).communicator == "gloo"


def test_with_a_device_for_each_rank_sharing_changes_nothing(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, device="cuda", world_size=4, share_devices=True)
    assert check_options(settings, count_devices=lambda: 4).communicator == "auto"


def test_nccl_between_ranks_that_share_a_device_is_refused_with_the_remedy(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, device="cuda", world_size=2, share_devices=True, communicator="nccl")
    with pytest.raises(ConfigurationError, match=r"--communicator nccl: .*with --share-devices write .* gloo"):
        check_options(settings, count_devices=lambda: 1)


def test_more_ranks_than_cores_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_devices(stand_in_settings(tmp_path, world_size=4096))
    assert "4096 ranks share" in caplog.text


def test_a_folder_without_config_json_is_named(tmp_path: Path) -> None:
    settings = dataclasses.replace(stand_in_settings(tmp_path), model_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigurationError, match="nowhere"):
        check_model(settings)


def test_config_json_decides_the_context_length(tmp_path: Path) -> None:
    assert check_model(stand_in_settings(tmp_path)).max_model_len == 128
    assert check_model(stand_in_settings(tmp_path, max_model_len=64)).max_model_len == 64


@pytest.mark.parametrize(
    ("changes", "explanation"),
    [
        ({"drain_timeout": -1.0}, "--drain-timeout -1.0"),
        ({"drain_timeout": float("nan")}, "--drain-timeout nan"),
        ({"communicator": "nccl"}, "--communicator nccl: --device cpu has shared_memory, gloo"),
        (
            {"communicator": "shared_memory", "ranks_per_pod": 1},
            "--communicator shared_memory: --device cpu with 2 pods has gloo",
        ),
        ({"max_model_len": 1}, "--max-model-len 1: a prompt and an answer need at least 2"),
        ({"max_model_len": 4096}, "max_model_len 4096 is more than the 128 positions"),
    ],
)
def test_an_option_that_cannot_work_is_named(tmp_path: Path, changes: dict[str, Any], explanation: str) -> None:
    with pytest.raises(ConfigurationError, match=explanation):
        check_model(check_options(stand_in_settings(tmp_path, **changes)))


@pytest.mark.parametrize("content", [b"", b"{", b"\xfe\x00", b"[1]"])
def test_a_config_json_that_is_no_json_object_is_named(tmp_path: Path, content: bytes) -> None:
    settings = stand_in_settings(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"^{tmp_path}: config\.json.*JSON"):
        check_model(settings)


def test_the_other_processes_are_told_a_definite_log_format(tmp_path: Path) -> None:
    assert check_options(stand_in_settings(tmp_path, log_format="auto")).log_format in ("json", "text")


def test_the_runtime_folder_is_private_and_removed(tmp_path: Path) -> None:
    with runtime_folder(stand_in_settings(tmp_path, runtime_dir=str(tmp_path))) as settings:
        folder = Path(settings.runtime_dir)
        assert folder.parent == tmp_path
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert settings.metrics_dir.is_dir()
        path = write_settings_file(settings)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert ServeSettings.from_json(path.read_text()) == settings
    assert not folder.exists()


def test_what_a_killed_supervisor_left_is_removed_by_the_next(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, runtime_dir=str(tmp_path))
    abandoned, young = tmp_path / "tpmodel-abandoned", tmp_path / "tpmodel-young"
    with runtime_folder(settings) as killed:
        for folder in (abandoned, young):
            shutil.copytree(killed.runtime_dir, folder)
    others = tmp_path / "tpmodel-models"
    others.mkdir()
    for folder in (abandoned, others):
        os.utime(folder, (0, 0))
    with runtime_folder(settings) as living:
        os.utime(living.runtime_dir, (0, 0))
        with runtime_folder(settings):
            assert Path(living.runtime_dir).is_dir(), "it is in use"
            assert young.is_dir(), "its supervisor may not have come to lock it yet"
            assert not abandoned.exists()
            assert others.is_dir(), "no supervisor has made it"


def test_a_token_is_drawn_where_none_is_given(tmp_path: Path) -> None:
    settings = stand_in_settings(tmp_path, token="", runtime_dir=str(tmp_path))
    with runtime_folder(settings) as first, runtime_folder(settings) as second:
        assert len(first.token) >= 32
        assert first.token != second.token
    with runtime_folder(dataclasses.replace(settings, token="given")) as third:
        assert third.token == "given"


def test_a_path_too_long_for_unix_sockets_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with pytest.raises(RuntimeFolderError, match="too long for a Unix socket"):
        runtime_folder(stand_in_settings(tmp_path, runtime_dir=str(long))).__enter__()
    assert list(long.iterdir()) == []
