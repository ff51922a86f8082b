"""The whole server against transformers: float32, greedy, mixed lengths, at once and one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.checkpoints import ARCHITECTURES, BASE, VARIANTS, make_checkpoint, random_prompts
from support.devices import DEVICES
from support.oracle import Reference, TieLedger
from support.scale import ORACLE_ARCHITECTURE_PROMPTS, ORACLE_ARCHITECTURE_WORLDS, ORACLE_PROMPTS, ORACLE_TOKENS
from tpmodel import AsyncClient, Client
from tpmodel.local import LocalServer

OPTIONS = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "16", "--log-format", "json"]
# Small steps, so that prompts go in chunks; a prefix cache, so that the second round hits it.
CHUNKED = [*OPTIONS, "--max-num-batched-tokens", "48", "--kv-cache-memory", "8M"]


@pytest.fixture(scope="session")
def ledger() -> Iterator[TieLedger]:
    ledger = TieLedger()
    yield ledger
    print(f"ties in the whole suite: {ledger.ties}")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: make_checkpoint(root / name, seed=index, **overrides)
        for index, (name, overrides) in enumerate((VARIANTS | ARCHITECTURES).items())
    }


def prompts_for(variant: str, *, seed: int) -> list[list[int]]:
    vocabulary = {**BASE, **VARIANTS.get(variant, {})}["vocab_size"]
    return random_prompts(ORACLE_PROMPTS, shortest=3, longest=160, vocabulary=vocabulary, seed=seed)


async def all_at_once(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    async with AsyncClient(target) as client:
        results = await asyncio.gather(
            *(client.complete(p, max_tokens=ORACLE_TOKENS, temperature=0, ignore_eos=True) for p in prompts)
        )
    return [result.token_ids[0] for result in results]


def one_by_one(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    with Client(target) as client:
        return [
            client.complete(p, max_tokens=ORACLE_TOKENS, temperature=0, ignore_eos=True).token_ids[0] for p in prompts
        ]


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("variant", list(VARIANTS))
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_are_those_of_transformers(
    device: str, variant: str, tp: int, checkpoints: dict[str, Path], ledger: TieLedger
) -> None:
    check_greedy(device, variant, tp, checkpoints, ledger)


@pytest.mark.parametrize("tp", ORACLE_ARCHITECTURE_WORLDS)
@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_of_other_architectures_are_those_of_transformers(
    device: str, architecture: str, tp: int, checkpoints: dict[str, Path], ledger: TieLedger
) -> None:
    check_greedy(device, architecture, tp, checkpoints, ledger, count=ORACLE_ARCHITECTURE_PROMPTS)


def check_greedy(
    device: str,
    variant: str,
    tp: int,
    checkpoints: dict[str, Path],
    ledger: TieLedger,
    *,
    count: int = ORACLE_PROMPTS,
) -> None:
    reference = Reference(checkpoints[variant])
    prompts = prompts_for(variant, seed=tp)[:count]
    with LocalServer(checkpoints[variant], tp=tp, device=device, options=CHUNKED) as server:
        batched = asyncio.run(all_at_once(server.target, prompts))
        alone = one_by_one(server.target, prompts)
    for index, prompt in enumerate(prompts):
        what = f"{variant}, tp {tp}, prompt {index}"
        assert len(batched[index]) == len(alone[index]) == ORACLE_TOKENS
        reference.check_greedy(prompt, batched[index], ledger, what=f"{what}, in a batch")
        reference.check_greedy(prompt, alone[index], ledger, what=f"{what}, alone, from the prefix cache")


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_tokens_survive_preemption(
    device: str, tp: int, checkpoints: dict[str, Path], ledger: TieLedger
) -> None:
    """A KV cache of 24 blocks of 16 tokens holds fewer than two of the longest sequences."""
    reference = Reference(checkpoints["untied"])
    prompts = prompts_for("untied", seed=100 + tp)
    bytes_per_block = 16 * 2 * BASE["num_hidden_layers"] * (BASE["num_key_value_heads"] // tp) * BASE["head_dim"] * 4
    options = [*OPTIONS, "--kv-cache-memory", str(24 * bytes_per_block), "--max-model-len", "256"]
    with LocalServer(checkpoints["untied"], tp=tp, device=device, options=options) as server:
        served = asyncio.run(all_at_once(server.target, prompts))
        assert preemptions(server) > 0
    for index, prompt in enumerate(prompts):
        reference.check_greedy(prompt, served[index], ledger, what=f"preempted, tp {tp}, prompt {index}")


def preemptions(server: LocalServer) -> float:
    import urllib.request

    with urllib.request.urlopen(f"{server.http_url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("tpmodel_preemptions_total"))
