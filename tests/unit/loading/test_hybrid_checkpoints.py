"""Checkpoints of hybrid models: what other uses of them need is passed over, by an explicit list."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import ARCHITECTURES, make_checkpoint
from support.lockstep import LockstepWorld
from support.shards import load_shard
from tpmodel_worker.loading.errors import CheckpointError


def rewrite(folder, **more):
    path = folder / "model.safetensors"
    save_file(load_file(path) | more, path)


@pytest.mark.parametrize("architecture", ["qwen3_next", "qwen3_5", "qwen3_5_moe"])
def test_drafting_layers_are_not_loaded(tmp_path, architecture):
    folder = make_checkpoint(tmp_path, **ARCHITECTURES[architecture])
    rewrite(folder, **{"mtp.fc.weight": torch.zeros(2, 3), "mtp.layers.0.input_layernorm.weight": torch.zeros(64)})
    (model,) = LockstepWorld(1).run(lambda communicator: load_shard(folder, communicator))
    assert not any("mtp" in name for name, _ in model.named_parameters())


def test_the_vision_encoder_is_not_loaded(tmp_path):
    folder = make_checkpoint(tmp_path, **ARCHITECTURES["qwen3_5"])
    assert "model.visual.patch_embed.proj.weight" in load_file(folder / "model.safetensors")
    (model,) = LockstepWorld(1).run(lambda communicator: load_shard(folder, communicator))
    assert not any("visual" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("qwen3_next", "model.visual.patch_embed.proj.weight"),
        ("qwen3_5", "model.audio.conv.weight"),
        ("qwen3_5", "model.language_model.layers.0.linear_attn.in_proj_qkvz.weight"),
        ("qwen3_5", "model.language_model.layers.0.self_attn.q_proj.weight"),
        ("qwen3_moe", "mtp.fc.weight"),
    ],
)
def test_any_other_tensor_is_refused(tmp_path, architecture, name):
    folder = make_checkpoint(tmp_path, **ARCHITECTURES[architecture])
    rewrite(folder, **{name: torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=f"unexpected tensor {name}"):
        LockstepWorld(1).run(lambda communicator: load_shard(folder, communicator))


def test_the_decay_stays_in_float32(tmp_path):
    """Its exponential and what it is summed to would suffer from bfloat16."""
    folder = make_checkpoint(tmp_path, dtype=torch.bfloat16, **ARCHITECTURES["qwen3_next"])

    def load(communicator):
        return load_shard(folder, communicator, torch.bfloat16)

    (model,) = LockstepWorld(1).run(load)
    kinds = {
        name.split("linear_attn.")[1]: weight.dtype for name, weight in model.named_parameters() if "linear" in name
    }
    assert kinds.pop("A_log.weight") == kinds.pop("dt_bias.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
