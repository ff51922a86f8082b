"""Logits of shards against transformers, on the same small random checkpoints."""

import math
import threading

import pytest
import torch

from support.checkpoints import VARIANTS, make_checkpoint
from support.lockstep import LockstepWorld
from support.oracle import Reference
from support.shards import PagedSequences, load_shard, world_logits

ROPES = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "yarn_exact_borders": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


pytestmark = pytest.mark.usefixtures("one_thread")


def prompt_tokens(lengths, vocabulary, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def check(logits, expected, what):
    vocabulary = expected.shape[1]
    assert torch.isinf(logits[:, vocabulary:]).all(), f"{what}: padding columns"
    difference = float((logits[:, :vocabulary] - expected).abs().max())
    assert difference < 1e-4, f"{what}: logits differ by {difference}"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill_equals_transformers(tmp_path, variant, world_size):
    checkpoint = make_checkpoint(tmp_path, **VARIANTS[variant])
    reference = Reference(checkpoint)
    prompts = prompt_tokens([1, 9, 30, 33, 90], reference.model.config.vocab_size)
    logits = world_logits(checkpoint, world_size, [list(enumerate(prompts))], max_length=96)
    for index, prompt in enumerate(prompts):
        check(logits[index], reference.logits(prompt), f"prompt {index}")


@pytest.mark.parametrize("world_size", [1, 2])
def test_chunks_and_decodes_in_one_batch_equal_transformers(tmp_path, world_size):
    """Chunked prefill, prefill from the start, decodes of very unlike lengths, all in the same steps."""
    checkpoint = make_checkpoint(tmp_path, **VARIANTS["kv_heads_fewer_than_ranks"])
    reference = Reference(checkpoint)
    tokens = prompt_tokens([230, 20, 40, 41, 70], reference.model.config.vocab_size)
    schedule = [
        [(0, 100), (1, 16)],
        [(0, 60), (1, 1), (2, 37)],
        [(0, 50), (1, 1), (2, 1), (3, 20), (4, 33)],
        [(0, 19), (1, 1), (2, 1), (3, 20), (4, 36)],
        [(0, 1), (1, 1), (2, 1), (3, 1), (4, 1)],
    ]
    steps, done = [], [0] * len(tokens)
    for counts in schedule:
        step = []
        for sequence, count in counts:
            step.append((sequence, tokens[sequence][done[sequence] : done[sequence] + count]))
            done[sequence] += count
        steps.append(step)
    assert done == [len(sequence) for sequence in tokens]
    logits = world_logits(checkpoint, world_size, steps, max_length=232)
    for index, sequence in enumerate(tokens):
        check(logits[index], reference.logits(sequence), f"sequence {index}")


def test_many_decodes_fall_into_groups_by_length(tmp_path):
    """Enough keys that one padded product would be wasteful."""
    checkpoint = make_checkpoint(tmp_path, **VARIANTS["untied"])
    reference = Reference(checkpoint)
    tokens = prompt_tokens([5, 900, 33, 420, 6, 610, 34, 17], reference.model.config.vocab_size)
    steps = [
        [(index, sequence[:-1]) for index, sequence in enumerate(tokens)],
        [(index, sequence[-1:]) for index, sequence in enumerate(tokens)],
    ]
    logits = world_logits(checkpoint, 1, steps, max_length=904)
    for index, sequence in enumerate(tokens):
        check(logits[index][-1:], reference.logits(sequence)[-1:], f"sequence {index}")


@pytest.mark.parametrize("rope", ROPES)
def test_rope_scalings_equal_transformers(tmp_path, rope):
    checkpoint = make_checkpoint(tmp_path, rope_parameters=ROPES[rope])
    reference = Reference(checkpoint)
    (prompt,) = prompt_tokens([300], reference.model.config.vocab_size)
    logits = world_logits(checkpoint, 1, [[(0, prompt)]], max_length=304)
    check(logits[0], reference.logits(prompt), rope)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_float32_as_transformers(tmp_path, dtype):
    checkpoint = make_checkpoint(tmp_path, dtype=dtype, initializer_range=0.1)
    exact = Reference(checkpoint)
    (prompt,) = prompt_tokens([200], exact.model.config.vocab_size)
    expected = exact.logits(prompt)
    theirs = (Reference(checkpoint, dtype).logits(prompt) - expected).square().mean().sqrt()
    (shard,) = LockstepWorld(1).run(lambda communicator: load_shard(checkpoint, communicator, dtype))
    with torch.inference_mode():
        paged = PagedSequences(shard, 1, max_length=200, dtype=dtype)
        logits = torch.cat([paged.step([(0, prompt[:120])])[0], paged.step([(0, prompt[120:])])[0]])
    ours = (logits[:, : expected.shape[1]] - expected).square().mean().sqrt()
    assert ours <= 1.5 * theirs, f"root mean square error {ours}, transformers {theirs}"


def test_two_all_reduces_for_each_layer_and_one_for_the_embedding(tmp_path):
    checkpoint = make_checkpoint(tmp_path, num_hidden_layers=2)

    def run(communicator):
        paged = PagedSequences(load_shard(checkpoint, communicator), 1, max_length=8)
        paged.step([(0, [1, 2, 3])])
        return communicator.all_reduces

    assert LockstepWorld(2).run(run) == [5, 5]


def test_a_shard_continues_with_the_communicator_of_a_new_epoch(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    shards = LockstepWorld(2).run(lambda communicator: load_shard(checkpoint, communicator))

    def run(communicator):
        shard = shards[communicator.rank]
        shard.bind(communicator)
        PagedSequences(shard, 1, max_length=8).step([(0, [1, 2, 3])])
        return communicator.all_reduces

    assert LockstepWorld(2).run(run) == [7, 7]


def test_a_shard_refuses_the_communicator_of_another_rank(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    world = LockstepWorld(2)
    shards = world.run(lambda communicator: load_shard(checkpoint, communicator))
    with pytest.raises(ValueError, match="rank 0 of 2"):
        shards[0].bind(world.communicators[1])


def test_a_batch_without_sample_rows_gives_no_logits(tmp_path):
    """A prefill chunk that is not the last one of its prompt."""
    checkpoint = make_checkpoint(tmp_path)

    def run(communicator):
        shard = load_shard(checkpoint, communicator)
        paged = PagedSequences(shard, 1, max_length=8)
        batch = paged.batch([(0, [1, 2, 3])])
        object.__setattr__(batch, "sample_rows", torch.empty(0, dtype=torch.int64))
        return shard(batch, paged.caches).shape

    assert LockstepWorld(1).run(run) == [(0, 512)]


def test_vocabulary_shards_cover_the_vocabulary_once(tmp_path):
    """The shard of rank r starts at r * S, where S is the vocabulary's share rounded up to 64."""
    checkpoint = make_checkpoint(tmp_path, vocab_size=523)
    for world_size in (1, 2, 4):
        shards = LockstepWorld(world_size).run(lambda communicator: load_shard(checkpoint, communicator))
        size = math.ceil(523 / world_size / 64) * 64
        assert [shard.vocab_shard for shard in shards] == [size] * world_size
        assert [shard.vocab_start for shard in shards] == [rank * size for rank in range(world_size)]
    assert threading.active_count() < 32
