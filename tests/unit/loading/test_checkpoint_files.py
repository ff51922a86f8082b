"""Headers, indexes, and everything that can be wrong with a checkpoint's files; errors name file and tensor."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.checkpoints import make_checkpoint
from support.lockstep import LockstepWorld
from tpmodel_worker.loading.checkpoint_files import INDEX_NAME, list_checkpoint_files, read_checkpoint, read_header
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.plan import plan_weights
from tpmodel_worker.loading.safetensors_reader import check_tensors
from tpmodel_worker.models.config import read_model_config
from tpmodel_worker.models.registry import build_model

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def checkpoint(tmp_path):
    return make_checkpoint(tmp_path, num_hidden_layers=2)


def split_checkpoint(folder, count=3):
    """Spreads model.safetensors over several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: names[index % count] for index, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def check(folder, world_size=1):
    """What loading does before it copies."""
    entries = read_checkpoint(list_checkpoint_files(folder))
    config = read_model_config(folder, world_size=world_size)
    for communicator in LockstepWorld(world_size).communicators:
        plan = plan_weights(build_model(config, communicator=communicator, dtype=torch.float32), entries)
        check_tensors(plan, entries)
    return entries


def test_one_file_without_an_index(checkpoint):
    assert list_checkpoint_files(checkpoint) == [checkpoint / "model.safetensors"]
    assert check(checkpoint)[NORM].shape == (64,)


def test_many_files_with_an_index(checkpoint):
    weight_map = split_checkpoint(checkpoint)
    entries = check(checkpoint, world_size=2)
    assert {name: entry.file.name for name, entry in entries.items()} == weight_map


def test_many_files_without_an_index(checkpoint):
    split_checkpoint(checkpoint)
    (checkpoint / INDEX_NAME).unlink()
    assert len(list_checkpoint_files(checkpoint)) == 3
    check(checkpoint)


def test_an_index_keeps_other_files_of_the_folder_out(checkpoint):
    split_checkpoint(checkpoint)
    save_file({"other": torch.zeros(1)}, checkpoint / "consolidated.safetensors")
    check(checkpoint)


def test_a_folder_without_safetensors_files(tmp_path):
    with pytest.raises(CheckpointError, match="there is no safetensors file in"):
        list_checkpoint_files(tmp_path)


def test_a_file_that_the_index_names_is_missing(checkpoint):
    weight_map = split_checkpoint(checkpoint)
    (checkpoint / weight_map[NORM]).unlink()
    with pytest.raises(CheckpointError, match=f"{weight_map[NORM]}: named by {INDEX_NAME} for tensor"):
        list_checkpoint_files(checkpoint)


def test_a_tensor_that_the_index_places_in_a_file_is_not_there(checkpoint):
    weight_map = split_checkpoint(checkpoint)
    path = checkpoint / weight_map[NORM]
    tensors = load_file(path)
    del tensors[NORM]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=f"{path.name}: tensor {NORM} is missing, which {INDEX_NAME}"):
        check(checkpoint)


def test_a_tensor_in_two_files(checkpoint):
    save_file({NORM: torch.zeros(64)}, checkpoint / "more.safetensors")
    with pytest.raises(CheckpointError, match=f"tensor {NORM} is also in"):
        read_checkpoint([checkpoint / "model.safetensors", checkpoint / "more.safetensors"])


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_malformed_index_is_named(checkpoint, index):
    (checkpoint / INDEX_NAME).write_text(index)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        list_checkpoint_files(checkpoint)


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file_is_named(checkpoint, kept):
    path = checkpoint / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        check(checkpoint)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        read_header(tmp_path / "absent.safetensors")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        7,
    ],
)
def test_a_malformed_header_entry_names_file_and_tensor(tmp_path, entry):
    header = json.dumps({"weight": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: tensor weight"):
        read_header(path)


def test_a_file_that_is_no_safetensors_file(tmp_path):
    path = tmp_path / "text.safetensors"
    path.write_bytes(struct.pack("<Q", 20) + b"x" * 40)
    with pytest.raises(CheckpointError, match=r"text\.safetensors"):
        read_header(path)


def test_a_missing_tensor_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop(NORM))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {NORM} is missing"):
        check(checkpoint)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.update({NORM: torch.zeros(63)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: tensor {NORM} has shape \(63,\).*\(64,\)"):
        check(checkpoint)


def test_an_unexpected_tensor_is_named(checkpoint):
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(128)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: unexpected tensor {name}"):
        check(checkpoint)


def test_rotary_buffers_are_skipped(checkpoint):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: torch.zeros(8)}))
    check(checkpoint)


def test_a_tied_checkpoint_may_carry_the_head_in_the_embeddings_shape_only(tmp_path):
    make_checkpoint(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 64)}))
    check(tmp_path, world_size=2)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(512, 32)}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(512, 32\), the weight it is tied to"):
        check(tmp_path)


def test_a_shard_that_is_all_padding_still_knows_its_tensors(tmp_path):
    make_checkpoint(tmp_path, vocab_size=130)
    check(tmp_path, world_size=4)
