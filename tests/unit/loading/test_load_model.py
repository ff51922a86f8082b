"""Loading into an arena that the supervisor holds, and mapping it again without opening a file."""

import json
from pathlib import Path

import pytest
import torch

from support.checkpoints import make_checkpoint
from support.lockstep import LockstepWorld
from support.rank_link import open_rank_link
from support.shards import PagedSequences
from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.comm.communicator import Communicator
from tpmodel_worker.comm.single import SingleCommunicator
from tpmodel_worker.loading.checkpoint_files import list_checkpoint_files, read_checkpoint
from tpmodel_worker.loading.errors import CheckpointError
from tpmodel_worker.loading.load import LoadedModel, load_model
from tpmodel_worker.models.config import read_model_config

CPU = torch.device("cpu")


@pytest.fixture
def holder():
    with open_rank_link() as holder:
        yield holder


@pytest.fixture
def arenas(holder):
    with ArenaClient(holder.path) as client:
        yield client


def load(checkpoint: Path, arenas: ArenaClient, communicator: Communicator | None = None, **changes) -> LoadedModel:
    communicator = communicator or SingleCommunicator(CPU)
    arguments = {
        "rank": communicator.rank,
        "world_size": communicator.world_size,
        "communicator": communicator,
        "device": CPU,
        "dtype": torch.float32,
        "load_format": "safetensors",
        "paths": list_checkpoint_files(checkpoint) if "paths" not in changes else [],
        "dummy_seed": 0,
        "arenas": arenas,
        "model_id": "m",
        "progress": lambda what, done, total: None,
    }
    config = read_model_config(checkpoint, world_size=communicator.world_size)
    return load_model(config, **{**arguments, **changes})


def logits_of(loaded: LoadedModel) -> torch.Tensor:
    with torch.inference_mode():
        return PagedSequences(loaded.model, 1, max_length=16).step([(0, [5, 6, 7, 8, 9])])[0]


def test_a_loaded_arena_is_held_complete_with_its_digests(tmp_path, holder, arenas):
    loaded = load(make_checkpoint(tmp_path), arenas)
    _, manifest = holder.arenas[ArenaId(0, "weights", 0)]
    assert manifest.state == worker_pb2.ARENA_STATE_COMPLETE
    assert sum(entry.digest for entry in manifest.digests) % 2**64 == loaded.digest
    assert {entry.name for entry in manifest.digests} == {name for name, _ in loaded.model.named_parameters()}
    assert not loaded.mapped


def test_the_arena_is_stored_as_loading_before_it_is_filled(tmp_path, holder, arenas):
    seen = []

    def progress(what, done, total):
        if what == "weights" and not seen:
            seen.append(holder.arenas[ArenaId(0, "weights", 0)][1].state)

    load(make_checkpoint(tmp_path), arenas, progress=progress)
    assert seen == [worker_pb2.ARENA_STATE_LOADING]


def test_a_complete_arena_is_mapped_without_a_file(tmp_path, arenas):
    checkpoint = make_checkpoint(tmp_path)
    first = load(checkpoint, arenas)
    (checkpoint / "model.safetensors").unlink()
    second = load(checkpoint, arenas, paths=[])
    assert (second.mapped, second.bytes_read, second.digest) == (True, 0, first.digest)
    assert torch.equal(logits_of(first), logits_of(second))


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "another"},
        {"dtype": torch.bfloat16},
        {"load_format": "dummy", "dummy_seed": 1},
    ],
    ids=str,
)
def test_an_arena_of_something_else_is_loaded_anew(tmp_path, arenas, change):
    checkpoint = make_checkpoint(tmp_path)
    load(checkpoint, arenas)
    assert not load(checkpoint, arenas, **change).mapped
    assert load(checkpoint, arenas, **change).mapped


def test_dummy_weights_of_another_seed_are_made_anew(tmp_path, arenas):
    checkpoint = make_checkpoint(tmp_path)
    first = load(checkpoint, arenas, load_format="dummy", dummy_seed=1)
    second = load(checkpoint, arenas, load_format="dummy", dummy_seed=2)
    assert not second.mapped
    assert second.digest != first.digest


def test_an_arena_that_was_being_loaded_is_loaded_anew(tmp_path, holder, arenas):
    checkpoint = make_checkpoint(tmp_path)
    load(checkpoint, arenas)
    holder.arenas[ArenaId(0, "weights", 0)][1].state = worker_pb2.ARENA_STATE_LOADING
    loaded = load(checkpoint, arenas)
    assert (loaded.mapped, loaded.weight_version) == (False, 0)


def test_an_arena_that_was_being_updated_is_mapped_without_a_version(tmp_path, holder, arenas):
    """E46: the checkpoint does not take the place of weights that were lost."""
    checkpoint = make_checkpoint(tmp_path)
    load(checkpoint, arenas)
    holder.arenas[ArenaId(0, "weights", 0)][1].state = worker_pb2.ARENA_STATE_UPDATING
    loaded = load(checkpoint, arenas)
    assert (loaded.mapped, loaded.weight_version) == (True, None)


def test_a_changed_byte_is_found_by_its_digest(tmp_path, arenas):
    checkpoint = make_checkpoint(tmp_path)
    first = load(checkpoint, arenas)
    first.arena.bytes[1000] ^= 1
    second = load(checkpoint, arenas)
    assert not second.mapped
    assert not torch.equal(first.arena.bytes, second.arena.bytes)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_rank_copies_only_its_slices(tmp_path, arenas, world_size):
    """Bytes out of the files are within 1.05 times the shard."""
    checkpoint = make_checkpoint(tmp_path, vocab_size=1024, num_key_value_heads=4, tie_word_embeddings=True)
    loaded = LockstepWorld(world_size).run(lambda communicator: load(checkpoint, arenas, communicator))
    for shard in loaded:
        assert shard.bytes_read <= 1.05 * shard.bytes
    entries = read_checkpoint(list_checkpoint_files(checkpoint))
    norms = sum(entry.size for name, entry in entries.items() if "norm" in name)
    whole = sum(entry.size for entry in entries.values())
    assert sum(shard.bytes_read for shard in loaded) == whole + (world_size - 1) * norms


def test_weights_are_converted_to_the_dtype_asked_for(tmp_path, arenas):
    checkpoint = make_checkpoint(tmp_path)
    entries = read_checkpoint(list_checkpoint_files(checkpoint))
    loaded = load(checkpoint, arenas, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.bytes_read == sum(entry.size for entry in entries.values())
    wide = load(checkpoint, arenas, dtype=torch.float32)
    name = "model.layers.0.mlp.gate_up_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), wide.model.get_parameter(name).bfloat16())


def test_progress_counts_up_to_the_total(tmp_path, arenas):
    events = []
    loaded = load(make_checkpoint(tmp_path), arenas, progress=lambda *event: events.append(event))
    for what, total in (("weights", loaded.bytes_read), ("digest", loaded.bytes)):
        done = [event[1] for event in events if event[0] == what]
        assert done == sorted(done)
        assert done[-1] == total
        assert {event[2] for event in events if event[0] == what} == {total}


def test_a_failed_load_leaves_nothing_at_the_supervisor(tmp_path, holder, arenas):
    checkpoint = make_checkpoint(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* has shape"):
        load(checkpoint, arenas)
    assert holder.arenas == {}


def test_another_ranks_communicator_is_refused(tmp_path, arenas):
    with pytest.raises(ValueError, match="rank 1 of 2"):
        load(make_checkpoint(tmp_path), arenas, rank=1, world_size=2)


def test_an_unknown_load_format_is_refused(tmp_path, arenas):
    with pytest.raises(ValueError, match="'pickle'"):
        load(make_checkpoint(tmp_path), arenas, load_format="pickle")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_holds_the_same_bytes(tmp_path, arenas, dtype):
    checkpoint = make_checkpoint(tmp_path, vocab_size=523)
    host = load(checkpoint, arenas, dtype=dtype)
    arenas.release(ArenaId(0, "weights", 0))
    device = torch.device("cuda:0")
    loaded = load(checkpoint, arenas, SingleCommunicator(device), device=device, dtype=dtype)
    assert loaded.digest == host.digest
    assert load(checkpoint, arenas, SingleCommunicator(device), device=device, dtype=dtype).mapped
