"""--persist-updates: a folder that cannot be used is refused before anything is served."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from support.supervised import stand_in_settings
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.configuration import ConfigurationError
from tpmodel_worker.supervisor.persist_folder import check_persist_folder

SET_BYTES = 1000


@pytest.fixture
def settings(tmp_path: Path) -> ServeSettings:
    """Of a checkpoint of that many bytes in two files."""
    settings = stand_in_settings(tmp_path, persist_updates=str(tmp_path / "updates"))
    for number in (1, 2):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes(SET_BYTES // 2))
    return settings


def plenty(_folder: Path) -> int:
    return 1 << 40


def test_a_folder_that_can_be_used_is_made_and_left_empty(settings: ServeSettings) -> None:
    check_persist_folder(settings)
    assert list(Path(settings.persist_updates).iterdir()) == []
    check_persist_folder(settings)


def test_a_missing_parent_is_named(settings: ServeSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(settings, persist_updates=str(tmp_path / "missing" / "updates"))
    with pytest.raises(ConfigurationError, match=rf"--persist-updates .*: {tmp_path}/missing does not exist: make it"):
        check_persist_folder(settings, free=plenty)


def test_a_file_is_refused(settings: ServeSettings) -> None:
    Path(settings.persist_updates).write_text("a file")
    with pytest.raises(ConfigurationError, match=r"--persist-updates .*: this is a file, a folder is needed"):
        check_persist_folder(settings, free=plenty)


def test_a_folder_that_cannot_be_written_is_refused(settings: ServeSettings) -> None:
    """Nobody may write there, not even the superuser, who may write everywhere else."""
    settings = dataclasses.replace(settings, persist_updates="/proc/self/task")
    with pytest.raises(ConfigurationError, match="--persist-updates /proc/self/task: it cannot be written: "):
        check_persist_folder(settings, free=plenty)


@pytest.mark.parametrize(("dtype", "needed"), [("", SET_BYTES), ("bfloat16", SET_BYTES // 2)])
def test_without_room_for_one_set_both_numbers_are_named(
    tmp_path: Path, settings: ServeSettings, dtype: str, needed: int
) -> None:
    """The stand-in's checkpoint is of float32."""
    settings = dataclasses.replace(settings, dtype=dtype)
    message = f"--persist-updates .*: one set of weights needs {needed} bytes, {needed - 1} are free there"
    with pytest.raises(ConfigurationError, match=message):
        check_persist_folder(settings, free=lambda _folder: needed - 1)
    check_persist_folder(settings, free=lambda _folder: needed)


def test_pods_serve_on_whatever_has_become_of_their_volume(settings: ServeSettings) -> None:
    settings = dataclasses.replace(settings, persist_updates="/proc/self/task")
    check_persist_folder(settings, {})
