"""The plan of a weights arena."""

import math

import pytest
import torch
from torch import nn

from support.checkpoints import ARCHITECTURES, BASE
from support.lockstep import LockstepWorld
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.plan import ALIGNMENT, bind_parameters, plan_weights
from tpmodel_worker.models.config import ModelConfig, parse_model_config
from tpmodel_worker.models.registry import build_model


def config_of(world_size, **changes) -> ModelConfig:
    base = {} if "text_config" in changes else {**BASE, "model_type": "qwen3"}
    return parse_model_config({**base, **changes}, world_size=world_size)


def plans(world_size, dtype=torch.float32, **changes):
    config = config_of(world_size, **changes)
    return [
        plan_weights(build_model(config, communicator=communicator, dtype=dtype))
        for communicator in LockstepWorld(world_size).communicators
    ]


def test_tensors_are_aligned_and_do_not_overlap():
    (plan,) = plans(1, dtype=torch.bfloat16, vocab_size=523, head_dim=6)
    end = 0
    for tensor in plan.tensors.values():
        assert tensor.offset % ALIGNMENT == 0
        assert tensor.offset >= end
        end = tensor.offset + tensor.size
    assert plan.size >= end


@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"num_key_value_heads": 2}, {"vocab_size": 131}, *ARCHITECTURES.values()],
)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_ranks_parts_cover_every_checkpoint_tensor(world_size, changes):
    """Each element goes to one rank, or to as many as share a KV head, or to all (norms, routers)."""
    kv_heads = changes.get("text_config", changes).get("num_key_value_heads", 4)
    covered: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for plan in plans(world_size, **changes):
        shapes |= plan.shapes
        for planned in plan.parts:
            part = planned.part
            counts = covered.setdefault(part.checkpoint_name, [0] * part.shape[part.dimension])
            for index in range(part.start, part.start + part.length):
                counts[index] += 1
    assert covered.keys() == shapes.keys()
    for name, counts in covered.items():
        if "norm" in name or "mlp.gate." in name or "shared_expert_gate" in name:
            expected = world_size
        elif "k_proj" in name or "v_proj" in name:
            expected = max(world_size // kv_heads, 1)
        else:
            expected = 1
        assert set(counts) == {expected}, name


def test_every_byte_of_a_parameter_is_filled_or_padding_of_the_vocabulary():
    for plan in plans(2, vocab_size=131):
        filled = dict.fromkeys(plan.tensors, 0)
        for planned in plan.parts:
            filled[planned.target] += planned.elements
        for name, tensor in plan.tensors.items():
            padding = math.prod(tensor.shape) - filled[name]
            assert padding == 0 or name in ("model.embed_tokens.weight", "lm_head.weight")


def test_tied_embeddings_share_one_shard():
    (plan,) = plans(1, tie_word_embeddings=True)
    assert "lm_head.weight" not in plan.tensors
    assert plan.aliases == {"lm_head.weight": (512, 64)}


def test_the_layout_hash_tells_layouts_apart():
    base = plans(1)[0].layout_hash
    assert plans(1)[0].layout_hash == base
    others = [
        plans(2)[0],
        plans(1, dtype=torch.bfloat16)[0],
        plans(1, num_hidden_layers=4)[0],
        plans(1, vocab_size=640)[0],
    ]
    assert len({base, *(plan.layout_hash for plan in others)}) == 5


def test_parameters_become_views_of_the_arena():
    (communicator,) = LockstepWorld(1).communicators
    model = build_model(config_of(1, tie_word_embeddings=True), communicator=communicator, dtype=torch.float32)
    plan = plan_weights(model)
    arena = Arena.create(ArenaId(0, "weights"), plan.size, torch.device("cpu"))
    bind_parameters(model, plan, arena)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == arena.bytes.data_ptr() + plan.tensors[name].offset
        assert not parameter.requires_grad
    assert model.get_parameter("lm_head.weight") is model.get_parameter("model.embed_tokens.weight")


def test_a_parameter_that_nothing_would_fill_is_refused():
    with pytest.raises(ValueError, match=r"parameter weight belongs to no sharded layer"):
        plan_weights(nn.Linear(2, 2, bias=False))
