"""The rank's test entry against transformers: logits of every position, at tp 2, by prefill and by decode."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.checkpoints import make_checkpoint, random_prompts
from support.oracle import Reference
from support.teacher_forcing import rank_logits


@pytest.mark.parametrize("chunk_size", [1, 7])
def test_logits_of_all_positions_equal_transformers(tmp_path: Path, chunk_size: int) -> None:
    checkpoint = make_checkpoint(tmp_path / "checkpoint", vocab_size=523, num_hidden_layers=2)
    sequences = random_prompts(3, shortest=5, longest=40, vocabulary=523, seed=3)
    found = rank_logits(tmp_path, checkpoint, sequences, world_size=2, chunk_size=chunk_size, block_size=4)
    reference = Reference(checkpoint)
    for sequence, logits in zip(sequences, found, strict=True):
        torch.testing.assert_close(logits, reference.logits(sequence), rtol=1e-4, atol=1e-4)
