"""Expert parallelism: every rank holds some experts whole, and the sum over the ranks is the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import ARCHITECTURES, BASE, EXPERTS, WHOLE_EXPERTS, make_checkpoint
from support.lockstep import LockstepWorld
from support.oracle import Reference
from support.shards import PagedSequences, dummy_shard, load_shard, world_logits
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files, read_checkpoint
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.plan import bind_parameters, plan_weights
from tpmodel_worker.models.config import ConfigError, parse_model_config, read_model_config, world_sizes_that_work
from tpmodel_worker.models.registry import build_model
from tpmodel_worker.weights.target import WeightTarget, missing_tensors

PROMPT = torch.randint(0, 512, (90,), generator=torch.Generator().manual_seed(3)).tolist()
SPARSE = {name: shape | WHOLE_EXPERTS for name, shape in ARCHITECTURES.items() if name in ("qwen3_moe", "qwen3_next")}


pytestmark = pytest.mark.usefixtures("one_thread")


def logits(folder, world_size, *, expert_parallel=True):
    steps = [[(0, PROMPT[:70])], [(0, PROMPT[70:89])], [(0, PROMPT[89:])]]
    return world_logits(folder, world_size, steps, max_length=96, expert_parallel=expert_parallel)[0][:, :512]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("architecture", SPARSE)
def test_logits_equal_transformers(tmp_path, architecture, world_size):
    folder = make_checkpoint(tmp_path, **SPARSE[architecture])
    expected = Reference(folder).logits(PROMPT)
    assert float((logits(folder, world_size) - expected).abs().max()) < 2e-4
    assert float(expected.std()) > 0.3


def test_a_rank_holds_whole_experts_and_reads_no_others(tmp_path):
    folder = make_checkpoint(tmp_path, **SPARSE["qwen3_moe"])
    config = read_model_config(folder, world_size=4, expert_parallel=True)
    communicator = LockstepWorld(4).communicators[2]
    model = build_model(config, communicator=communicator, dtype=torch.float32)
    plan = plan_weights(model, read_checkpoint(list_checkpoint_files(folder)))
    read = {
        int(planned.part.checkpoint_name.split(".experts.")[1].split(".")[0])
        for planned in plan.parts
        if ".experts." in planned.part.checkpoint_name
    }
    assert read == {6, 7, 8}
    shapes = [tensor.shape for name, tensor in plan.tensors.items() if ".experts." in name]
    assert set(shapes) == {(3, 80, 64), (3, 64, 40)}


def test_a_missing_expert_of_another_rank_is_named_too(tmp_path):
    folder = make_checkpoint(tmp_path, **SPARSE["qwen3_moe"])
    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.experts.11.up_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"experts\.11\.up_proj\.weight is missing"):
        load_shard(folder, LockstepWorld(2).communicators[0], expert_parallel=True)


def test_a_live_update_fills_the_same_shard_as_loading(tmp_path):
    folder = make_checkpoint(tmp_path, **SPARSE["qwen3_moe"])
    loaded = load_shard(folder, LockstepWorld(2).communicators[1], expert_parallel=True)
    config = read_model_config(folder, world_size=2, expert_parallel=True)
    model = build_model(config, communicator=LockstepWorld(2).communicators[1], dtype=torch.float32)
    plan = plan_weights(model)
    target = WeightTarget(plan, Arena.create(ArenaId(1, "weights", 1), plan.size, torch.device("cpu")))
    tensors = stacked(load_file(folder / "model.safetensors"))
    for name, tensor in tensors.items():
        target.load(name, tensor)
    assert missing_tensors(plan, set(tensors)) == []
    bind_parameters(model, plan, target.arena)
    expected = dict(loaded.named_parameters())
    assert all(torch.equal(parameter, expected[name]) for name, parameter in model.named_parameters())


def stacked(tensors):
    """Experts' tensors as one for all of a layer, which is how the model names them."""
    others = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in (0, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([tensors[f"{prefix}.{expert}.{projection}.weight"] for expert in range(12)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        )
        others |= {f"{prefix}.gate_up_proj": torch.cat((gate, up), dim=1), f"{prefix}.down_proj": down}
    return others


def test_stacked_experts_are_the_same_weights(tmp_path):
    folder = make_checkpoint(tmp_path, **SPARSE["qwen3_moe"])
    single = logits(folder, 2)
    path = folder / "model.safetensors"
    save_file(stacked(load_file(path)), path)
    assert torch.equal(logits(folder, 2), single)


def test_dummy_weights_are_those_of_any_other_world():
    shape = BASE | SPARSE["qwen3_moe"]

    def run(expert_parallel, world_size):
        config = parse_model_config(shape, world_size=world_size, expert_parallel=expert_parallel)

        def shard_logits(communicator):
            paged = PagedSequences(dummy_shard(config, communicator, seed=7), 1, max_length=96)
            return paged.step([(0, PROMPT)])[0]

        return torch.cat(LockstepWorld(world_size).run(shard_logits), dim=1)[:, :512]

    torch.testing.assert_close(run(True, 4), run(False, 2), atol=1e-4, rtol=0)


def test_memory_is_planned_for_all_features_of_an_expert():
    """On a device that the router sends every token to."""
    shape = BASE | SPARSE["qwen3_moe"] | {"moe_intermediate_size": 400}
    parts, whole = (parse_model_config(shape, world_size=4, expert_parallel=whole) for whole in (False, True))
    assert whole.activations_per_token(4) - parts.activations_per_token(4) == 3 * 4 * (400 - 100)


def test_experts_that_ranks_cannot_share_are_refused_with_the_sizes_that_work():
    shape = BASE | EXPERTS
    with pytest.raises(ConfigError, match=r"world size 2: num_experts 9 is not divisible by it; sizes that work: 1$"):
        parse_model_config(shape, world_size=2, expert_parallel=True)
    shape |= {"num_experts": 12, "moe_intermediate_size": 42}
    config = parse_model_config(shape, world_size=4, expert_parallel=True)
    assert world_sizes_that_work(config) == [1, 2, 4]
    with pytest.raises(ConfigError, match=r"moe_intermediate_size 42 is not divisible by it; sizes that work: 1, 2$"):
        parse_model_config(shape, world_size=4)


def test_a_model_without_experts_refuses_it():
    with pytest.raises(ConfigError, match="expert parallelism: model_type 'qwen3' has no experts; leave it off"):
        parse_model_config(BASE | {"model_type": "qwen3"}, world_size=1, expert_parallel=True)
