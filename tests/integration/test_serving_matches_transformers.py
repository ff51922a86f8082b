"""The whole server against transformers: float32, greedy, mixed lengths, at once and one by one.

One server for each model and world. Its steps are so small that prompts go in chunks, its KV cache so small that
sequences are preempted, and what comes one by one begins in the prefix cache.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from support.checkpoints import ARCHITECTURES, VARIANTS, WHOLE_EXPERTS, make_checkpoint, random_prompts
from support.devices import DEVICES
from support.local_servers import metric
from support.lockstep import LockstepWorld
from support.oracle import Reference, TieLedger
from support.scale import FULL, ORACLE_CACHE_TOKENS, ORACLE_PROMPTS, ORACLE_TOKENS, ORACLE_WORLDS
from tpmodel import AsyncClient, Client
from tpmodel.local import LocalServer
from tpmodel_worker.models.config import read_model_config
from tpmodel_worker.models.registry import build_model
from tpmodel_worker.rank.cache_sizes import KvShape

WHOLE = "whole_experts"
MODELS = VARIANTS | ARCHITECTURES | {WHOLE: ARCHITECTURES["qwen3_moe"] | WHOLE_EXPERTS}
CASES = [(model, tp) for model in MODELS for tp in ((1, 2, 4) if FULL else ORACLE_WORLDS.get(model, ()))]
SLOTS, BLOCK, MAX_LENGTH = 16, 16, 256
STATE_BLOCK, SNAPSHOTS = 4, 8
"""Of models with recurrent state: small blocks, so that snapshots lie near to each other, too."""
LONGEST = 160
"""Tokens of a prompt: more than one step takes, and than the linear layers compute at once."""
LONG_ANSWER = 150
OPTIONS = [
    *("--dtype", "float32", "--max-model-len", str(MAX_LENGTH), "--max-num-seqs", str(SLOTS)),
    *("--max-num-batched-tokens", "100", "--log-format", "json"),
]


@pytest.fixture(scope="module")
def ledger() -> Iterator[TieLedger]:
    ledger = TieLedger()
    yield ledger
    print(f"ties in the whole suite: {ledger.ties}")


class Models:
    """Checkpoints and what transformers makes of them, each once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @functools.cache  # noqa: B019 (lives as long as the module's tests)
    def checkpoint(self, model: str) -> Path:
        return make_checkpoint(self._root / model, seed=list(MODELS).index(model), **MODELS[model])

    @functools.cache  # noqa: B019
    def reference(self, model: str) -> Reference:
        return Reference(self.checkpoint(model))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("checkpoints"))


def options_for(checkpoint: Path, model: str, tp: int) -> list[str]:
    """Memory for all states and ORACLE_CACHE_TOKENS tokens: too few for the sequences that run at once."""
    whole = model == WHOLE
    config = read_model_config(checkpoint, world_size=tp, expert_parallel=whole)
    rank = build_model(config, communicator=LockstepWorld(tp).communicators[0], dtype=torch.float32)
    block = BLOCK if rank.state_shape is None else STATE_BLOCK
    shape = KvShape.of_model(rank, block_size=block, dtype=torch.float32, slots=SLOTS, snapshots=SNAPSHOTS)
    memory = shape.state_bytes + (ORACLE_CACHE_TOKENS // block + 1) * shape.block_bytes
    options = [*OPTIONS, "--block-size", str(block), "--kv-cache-memory", str(memory)]
    return [*options, "--state-snapshots", str(SNAPSHOTS), *(["--expert-parallel"] if whole else [])]


async def all_at_once(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Every prompt's tokens, beside clients that go away amid their answer."""
    options = {"max_tokens": ORACLE_TOKENS, "temperature": 0, "ignore_eos": True}
    async with AsyncClient(target) as client:

        async def leave(prompt: list[int], chunks: int) -> None:
            stream = client.generate(prompt, **options)
            async for _ in stream:
                chunks -= 1
                if chunks == 0:
                    break
            stream.cancel()

        leaving = [leave(prompt[::-1], chunks) for chunks, prompt in enumerate(prompts[:3], 1)]
        staying = [client.complete(prompt, **options) for prompt in prompts]
        results, *_ = await asyncio.gather(asyncio.gather(*staying), *leaving)
    return [result.token_ids[0] for result in results]


async def outgrow_memory(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """The tokens of prompts that fit beside each other with answers that do not, and last long enough to meet."""
    async with AsyncClient(target) as client:
        answers = [
            client.complete(prompt, max_tokens=LONG_ANSWER, temperature=0, ignore_eos=True) for prompt in prompts
        ]
        results = await asyncio.gather(*answers)
    return [result.token_ids[0] for result in results]


def one_by_one(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    with Client(target) as client:
        return [
            client.complete(p, max_tokens=ORACLE_TOKENS, temperature=0, ignore_eos=True).token_ids[0] for p in prompts
        ]


@pytest.mark.parametrize(("model", "tp"), CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_are_those_of_transformers(
    device: str, model: str, tp: int, models: Models, ledger: TieLedger
) -> None:
    reference = models.reference(model)
    vocabulary = MODELS[model].get("vocab_size", 512)
    prompts = random_prompts(ORACLE_PROMPTS, shortest=3, longest=LONGEST, vocabulary=vocabulary, seed=tp)
    # As many as fit beside each other, of whose whole answers not even two do.
    growing = random_prompts(
        ORACLE_CACHE_TOKENS // 128, shortest=100, longest=100, vocabulary=vocabulary, seed=100 + tp
    )
    checkpoint = models.checkpoint(model)
    options = options_for(checkpoint, model, tp)
    if device == "cuda":
        options.append("--share-devices")
    with LocalServer(checkpoint, tp=tp, device=device, options=options) as server:
        batched = asyncio.run(all_at_once(server.target, prompts))
        alone = one_by_one(server.target, prompts)
        longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
        # The second time it begins in the prefix cache for sure.
        assert one_by_one(server.target, [prompts[longest]] * 2) == [alone[longest]] * 2
        grown = asyncio.run(outgrow_memory(server.target, growing))
        assert metric(f"{server.http_url}/metrics", "tpmodel_preemptions_total") > 0
        assert metric(f"{server.http_url}/metrics", "tpmodel_prefix_cache_hits_total") > 0
    for index, prompt in enumerate(prompts):
        what = f"{model}, tp {tp}, prompt {index}"
        assert len(batched[index]) == len(alone[index]) == ORACLE_TOKENS
        reference.check_greedy(prompt, batched[index], ledger, what=f"{what}, in a batch")
        if alone[index] != batched[index]:
            reference.check_greedy(prompt, alone[index], ledger, what=f"{what}, alone")
    for index, prompt in enumerate(growing):
        assert len(grown[index]) == LONG_ANSWER
        reference.check_greedy(prompt, grown[index], ledger, what=f"{model}, tp {tp}, long answer {index}")
