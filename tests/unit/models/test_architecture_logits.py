"""Logits of shards of the other architectures against transformers, on small random checkpoints."""

from __future__ import annotations

import pytest
import torch

from support.checkpoints import ARCHITECTURES, make_checkpoint
from support.oracle import Reference
from support.shards import world_logits


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
