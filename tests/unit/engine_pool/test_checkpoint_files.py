"""Which files of a checkpoint the ranks are told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tpmodel_worker.engine.checkpoint import read_checkpoint
from tpmodel_worker.engine.errors import ConfigurationError


def write(folder: Path, *names: str) -> None:
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    for name in names:
        (folder / name).write_bytes(b"")


def test_all_safetensors_files_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, "b.safetensors", "a.safetensors", "tokenizer.json")
    checkpoint = read_checkpoint(tmp_path, "safetensors")
    assert checkpoint.safetensors_paths == (str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"))
    assert checkpoint.config_json == '{"model_type": "qwen3"}'


def test_the_whole_model_file_keeps_its_parts_out(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", "consolidated.safetensors")
    assert read_checkpoint(tmp_path, "safetensors").safetensors_paths == (str(tmp_path / "model.safetensors"),)


def test_only_what_the_index_names(tmp_path: Path) -> None:
    write(tmp_path, "one.safetensors", "two.safetensors", "other.safetensors")
    index = {"weight_map": {"x": "two.safetensors", "y": "one.safetensors", "z": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    paths = read_checkpoint(tmp_path, "safetensors").safetensors_paths
    assert paths == (str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors"))


def test_file_that_the_index_names_but_is_missing(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    with pytest.raises(
        ConfigurationError, match=r"gone\.safetensors: named by .*index\.json for tensor x, but missing"
    ):
        read_checkpoint(tmp_path, "safetensors")


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": 3}'])
def test_index_that_can_not_be_read(tmp_path: Path, content: str) -> None:
    write(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigurationError, match=r"index\.json: "):
        read_checkpoint(tmp_path, "safetensors")


def test_dummy_weights_need_no_files(tmp_path: Path) -> None:
    write(tmp_path)
    assert read_checkpoint(tmp_path, "dummy").safetensors_paths == ()


def test_no_weights_at_all(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigurationError, match="there is no safetensors file in"):
        read_checkpoint(tmp_path, "safetensors")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config\.json can't be read"):
        read_checkpoint(tmp_path, "dummy")
