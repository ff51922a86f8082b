"""Logits of shards of the other architectures against transformers, on small random checkpoints."""

from __future__ import annotations

import pytest
import torch

from support.checkpoints import ARCHITECTURES, make_checkpoint
from support.lockstep import LockstepWorld
from support.oracle import Reference
from support.shards import PagedSequences, load_shard, world_logits

pytestmark = pytest.mark.usefixtures("one_thread")


def prompt_tokens(lengths, vocabulary, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (length,), generator=generator).tolist() for length in lengths]


def check(logits, expected, what):
    vocabulary = expected.shape[1]
    difference = float((logits[:, :vocabulary] - expected).abs().max())
    assert difference < 1e-4, f"{what}: logits differ by {difference}"
    assert float(expected.std()) > 0.3, "weights that make all logits alike would hide errors"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chunks_and_decodes_in_one_batch_equal_transformers(tmp_path, architecture, world_size):
    """Chunked prefill past the linear layers' chunk size, prefill from the start, decodes, all in the same steps."""
    checkpoint = make_checkpoint(tmp_path, **ARCHITECTURES[architecture])
    reference = Reference(checkpoint)
    tokens = prompt_tokens([230, 20, 40, 41, 70], 512)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_as_close_to_float32_as_transformers(tmp_path, architecture):
    checkpoint = make_checkpoint(tmp_path, dtype=torch.bfloat16, **ARCHITECTURES[architecture])
    (prompt,) = prompt_tokens([300], 512)
    expected = Reference(checkpoint).logits(prompt)
    theirs = (Reference(checkpoint, torch.bfloat16).logits(prompt) - expected).square().mean().sqrt()
    (shard,) = LockstepWorld(1).run(lambda communicator: load_shard(checkpoint, communicator, torch.bfloat16))
    with torch.inference_mode():
        paged = PagedSequences(shard, 1, max_length=300, dtype=torch.bfloat16)
        logits = torch.cat([paged.step([(0, prompt[:180])])[0], paged.step([(0, prompt[180:])])[0]])
    ours = (logits[:, :512] - expected).square().mean().sqrt()
    print(f"{architecture}: root mean square error {ours}, transformers {theirs}")
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_two_all_reduces_for_each_layer_and_one_for_the_embedding(tmp_path, architecture):
    checkpoint = make_checkpoint(tmp_path, **ARCHITECTURES[architecture])

    def run(communicator):
        model = load_shard(checkpoint, communicator)
        PagedSequences(model, 1, max_length=8).step([(0, [1, 2, 3])])
        return communicator.all_reduces - 2 * model.config.num_hidden_layers

    assert LockstepWorld(2).run(run) == [1, 1]
