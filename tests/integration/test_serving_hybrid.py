"""The whole server with a model that keeps recurrent state: slots, memory and blocks under pressure."""

from __future__ import annotations

import asyncio
import math
import urllib.request
from pathlib import Path

import pytest

from support.checkpoints import ARCHITECTURES, HYBRID, make_checkpoint, random_prompts
from support.devices import DEVICES
from support.oracle import Reference, TieLedger
from tpmodel import AsyncClient
from tpmodel.local import LocalServer

TP, SLOTS, BLOCK, BLOCKS, TOKENS = 2, 3, 16, 24, 80


def state_bytes() -> int:
    """Of three linear-attention layers on each of two ranks, float32; both parts rounded up to 256 bytes."""
    key_heads, value_heads = HYBRID["linear_num_key_heads"] // TP, HYBRID["linear_num_value_heads"] // TP
    key_dim, value_dim = HYBRID["linear_key_head_dim"], HYBRID["linear_value_head_dim"]
    features = 3 * (2 * key_heads * key_dim + value_heads * value_dim)
    return sum(math.ceil(3 * SLOTS * 4 * part / 256) * 256 for part in (features, value_heads * key_dim * value_dim))


def block_bytes() -> int:
    """Of the one full-attention layer's keys and values."""
    return 2 * BLOCK * (HYBRID["num_key_value_heads"] // TP) * HYBRID["head_dim"] * 4


async def under_pressure(target: str, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Every prompt's greedy tokens, all asked for at once, beside clients that go away amid their answer."""
    options = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    async with AsyncClient(target) as client:

        async def leave(prompt: list[int], chunks: int) -> None:
            stream = client.generate(prompt, **options)
            async for _ in stream:
                chunks -= 1
                if chunks == 0:
                    break
            stream.cancel()

        leaving = [leave(prompt[::-1], chunks) for chunks, prompt in enumerate(prompts[:4], 1)]
        staying = [client.complete(prompt, **options) for prompt in prompts]
        twice = client.complete(prompts[0], n=2, **options)
        results, samples, *_ = await asyncio.gather(asyncio.gather(*staying), twice, *leaving)
    assert samples.token_ids[0] == samples.token_ids[1] == results[0].token_ids[0]
    return [result.token_ids[0] for result in results]


def metric(server: LocalServer, name: str) -> float:
    with urllib.request.urlopen(f"{server.http_url}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


@pytest.mark.parametrize("device", DEVICES)
def test_slots_blocks_and_clients_come_and_go(device: str, tmp_path: Path) -> None:
    """Preemption, cancels, several samples and repeated prompts; with blocks for fewer than all slots' sequences."""
    checkpoint = make_checkpoint(tmp_path, **ARCHITECTURES["qwen3_next"])
    reference, ledger = Reference(checkpoint), TieLedger()
    prompts = random_prompts(8, shortest=60, longest=100, vocabulary=512, seed=11)
    memory = state_bytes() + (BLOCKS + 1) * block_bytes()
    options = ["--dtype", "float32", "--max-num-seqs", str(SLOTS), "--kv-cache-memory", str(memory)]
    options += ["--max-model-len", "256", "--max-num-batched-tokens", "96", "--log-format", "text"]
    with LocalServer(checkpoint, tp=TP, device=device, options=options) as server:
        served = asyncio.run(under_pressure(server.target, prompts))
        again = asyncio.run(under_pressure(server.target, prompts[:2]))
        assert metric(server, "tpmodel_preemptions_total") > 0
        assert metric(server, "tpmodel_prefix_cache_hits_total") == 0
        assert metric(server, "tpmodel_prefix_cache_queries_total") == 0
        log = server.output
    for index, prompt in enumerate(prompts):
        reference.check_greedy(prompt, served[index], ledger, what=f"prompt {index}")
    assert again == served[:2]
    assert f"{BLOCKS} KV blocks of {BLOCK} tokens" in log
    line = f"recurrent state of {SLOTS} sequences takes {state_bytes()} bytes of each rank, beside the KV blocks"
    assert log.count(f"{line}; the prefix cache is off: blocks do not hold that state") == 1
