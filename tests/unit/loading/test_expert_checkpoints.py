"""Experts in checkpoints: a few tensors for each expert, or one that stacks them all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import EXPERTS, make_checkpoint
from support.shards import world_logits
from tpmodel_worker.loading.errors import CheckpointError

PROMPT = [5, 9, 200, 31, 77]
LAYER = "model.layers.0.mlp.experts"


@pytest.fixture
def checkpoint(tmp_path):
    """As published: three tensors for each expert."""
    folder = make_checkpoint(tmp_path, **EXPERTS)
    assert f"{LAYER}.8.down_proj.weight" in load_file(folder / "model.safetensors")
    return folder


def stack(folder, *, keep=False):
    """Rewrites a checkpoint with one gate_up_proj and one down_proj for all experts of a layer."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    stacked: dict[str, torch.Tensor] = {}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts"

        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in range(9)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        stacked |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    others = {name: tensor for name, tensor in tensors.items() if keep or ".experts." not in name}
    save_file(others | stacked, path)


def logits(folder, world_size):
    return world_logits(folder, world_size, [[(0, PROMPT)]], max_length=8)[0]


@pytest.mark.parametrize("world_size", [1, 4])
def test_stacked_experts_are_the_same_weights(checkpoint, world_size):
    single = logits(checkpoint, world_size)
    stack(checkpoint)
    assert torch.equal(logits(checkpoint, world_size), single)


def test_a_missing_expert_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    del tensors[f"{LAYER}.3.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=rf"tensor {LAYER}\.3\.up_proj\.weight is missing"):
        logits(checkpoint, 1)


def test_experts_that_are_there_twice_are_refused(checkpoint):
    stack(checkpoint, keep=True)
    with pytest.raises(CheckpointError, match=r"unexpected tensor model\.layers\..*\.experts\.\d\."):
        logits(checkpoint, 1)


def test_stacked_experts_of_another_number_are_refused(checkpoint):
    stack(checkpoint)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    tensors[f"{LAYER}.down_proj"] = tensors[f"{LAYER}.down_proj"][:8].clone()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"down_proj has shape \(8, 64, 40\), the config gives \(9, 64, 40\)"):
        logits(checkpoint, 1)
