"""bf16 against transformers by the bf16 rule: a small checkpoint on CPU ranks, Qwen3-8B's shapes on GPUs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.bf16 import POSITIONS, Yardstick, checkpoint_model, dummy_model, logits_of, rms
from support.checkpoints import make_checkpoint, random_prompts
from support.model_shapes import QWEN3_8B
from support.teacher_forcing import rank_logits
from tpmodel import AsyncClient
from tpmodel.local import LocalServer

SEQUENCE = 256
DUMMY_SEED = 5


async def served_tokens(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    async with AsyncClient(target) as client:
        calls = [client.complete(prompt, max_tokens=64, temperature=0, ignore_eos=True) for prompt in prompts]
        return [result.token_ids[0] for result in await asyncio.gather(*calls)]


def check_served(server: LocalServer, model: Any, yardstick: Yardstick, vocabulary: int, what: str) -> None:
    prompts = random_prompts(4, shortest=8, longest=120, vocabulary=vocabulary, seed=21)
    for index, tokens in enumerate(asyncio.run(served_tokens(server.target, prompts))):
        yardstick.check_tokens(model, prompts[index], tokens, what=f"{what}, prompt {index}")


def test_a_small_checkpoint_on_cpu_ranks_holds_the_bf16_rule(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    exact, half = (checkpoint_model(checkpoint, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16))
    sequences = random_prompts(POSITIONS // SEQUENCE, shortest=SEQUENCE, longest=SEQUENCE, vocabulary=512, seed=9)
    expected = torch.cat([logits_of(exact, sequence) for sequence in sequences])
    yardstick = Yardstick(rms(torch.cat([logits_of(half, sequence) for sequence in sequences]) - expected))
    found = rank_logits(tmp_path, checkpoint, sequences, world_size=2, dtype="bfloat16")
    yardstick.check_logits(rms(torch.cat(found) - expected), what="tp 2 on CPU")
    options = ["--dtype", "bfloat16", "--max-model-len", "256"]
    with LocalServer(checkpoint, tp=2, device="cpu", options=options) as server:
        check_served(server, half, yardstick, 512, "tp 2 on CPU")


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_qwen3_8b_shapes_hold_the_bf16_rule_at_tp_1_and_4(tmp_path: Path) -> None:
    model_path = tmp_path / "8b"
    model_path.mkdir()
    (model_path / "config.json").write_text(json.dumps(QWEN3_8B))
    vocabulary = QWEN3_8B["vocab_size"]
    count = POSITIONS // SEQUENCE
    sequences = random_prompts(count, shortest=SEQUENCE, longest=SEQUENCE, vocabulary=vocabulary, seed=9)

    half = dummy_model(QWEN3_8B, DUMMY_SEED, torch.bfloat16, "cuda:0")
    exact = dummy_model(QWEN3_8B, DUMMY_SEED, torch.float32, "cuda:0")
    # On the host, since 4,096 rows of 152 thousand logits take 2.5 GB.
    expected = torch.cat([logits_of(exact, sequence).cpu() for sequence in sequences])
    del exact
    torch.cuda.empty_cache()
    yardstick = Yardstick(rms(torch.cat([logits_of(half, sequence).cpu() for sequence in sequences]) - expected))
    for tp in (1, 4):
        folder = tmp_path / f"tp{tp}"
        folder.mkdir()
        found = rank_logits(
            folder, model_path, sequences, world_size=tp, dtype="bfloat16", device="cuda", chunk_size=SEQUENCE,
            load_format="dummy", dummy_seed=DUMMY_SEED,
        )  # fmt: skip
        yardstick.check_logits(rms(torch.cat(found) - expected), what=f"8B, tp {tp}")
        options = ["--load-format", "dummy", "--dummy-seed", str(DUMMY_SEED), "--max-model-len", "512",
                   "--kv-cache-memory", "2Gi"]  # fmt: skip
        with LocalServer(model_path, tp=tp, device="cuda", options=options) as server:
            check_served(server, half, yardstick, vocabulary, f"8B, tp {tp}")
