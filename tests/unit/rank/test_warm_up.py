"""What a spare runs ahead of need: steps of a small copy of the model, which leave nothing behind."""

from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import ARCHITECTURES, BASE
from support.model_shapes import QWEN3_8B
from tpmodel_worker.models.config import parse_model_config
from tpmodel_worker.rank.runner import StepRunner
from tpmodel_worker.rank.warm_up import small_copy, warm_up
from tpmodel_worker.settings import ServeSettings

CPU = torch.device("cpu")
DENSE = BASE | {"model_type": "qwen3"}
MIXED = BASE | ARCHITECTURES["qwen3_moe"]
HYBRID, NESTED = ARCHITECTURES["qwen3_next"], ARCHITECTURES["qwen3_5"]


def settings_for(folder: Path, config: dict[str, Any], **changes: Any) -> ServeSettings:
    (folder / "config.json").write_text(json.dumps(config))
    values: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, **changes}
    return ServeSettings(model_path=str(folder), model_id="m", served_name="m", **values)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences of each step that was computed to its end."""
    computed: list[int] = []
    step = StepRunner._step

    def note(self: StepRunner, decodes: Any, chunks: Any) -> Any:
        outcome = step(self, decodes, chunks)
        computed.append(len(outcome[0]))
        return outcome

    monkeypatch.setattr(StepRunner, "_step", note)
    return computed


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("config", [DENSE, MIXED, HYBRID, NESTED], ids=["dense", "experts", "hybrid", "nested"])
def test_prompts_and_decodes_are_computed_without_peers(
    tmp_path: Path, steps: list[int], config: dict[str, Any], world_size: int
) -> None:
    warm_up(settings_for(tmp_path, config, world_size=world_size), CPU)
    assert steps == [4, 4, 4, 1]


def test_the_memory_is_given_back(tmp_path: Path, steps: list[int]) -> None:
    def tensor_bytes() -> int:
        gc.collect()
        return sum(entry.nbytes for entry in gc.get_objects() if type(entry) is torch.Tensor)

    settings = settings_for(tmp_path, DENSE)
    warm_up(settings, CPU)
    before = tensor_bytes()
    warm_up(settings, CPU)
    assert len(steps) == 8
    assert tensor_bytes() <= before + 4096


def test_where_there_is_no_memory_it_says_so_and_the_process_lives(
    tmp_path: Path, steps: list[int], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tpmodel_worker.rank.warm_up._CACHE_BYTES", 1)
    settings = settings_for(tmp_path, DENSE)
    with caplog.at_level(logging.WARNING):
        warm_up(settings, CPU)
    assert steps == []
    assert "no kernels are loaded ahead on cpu" in caplog.text


def test_the_copy_has_the_shapes_of_the_layers_and_one_layer_of_each_kind() -> None:
    copied = parse_model_config(small_copy(QWEN3_8B, world_size=2), world_size=2)
    whole = parse_model_config(QWEN3_8B, world_size=2)
    assert copied.num_hidden_layers == 1
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "dtype"):
        assert getattr(copied, name) == getattr(whole, name)
    hybrid = parse_model_config(small_copy(HYBRID, world_size=1), world_size=1)
    linear = hybrid.linear_attention
    assert linear is not None
    assert 0 < len(linear.layers) < hybrid.num_hidden_layers
