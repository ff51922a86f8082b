"""Many mixed requests with random cancels at tp 2: afterwards nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import psutil
import pytest

from support.checkpoints import BASE, make_checkpoint
from support.scale import SOAK_REQUESTS
from tpmodel import AsyncClient, Client
from tpmodel.local import LocalServer

CONCURRENCY = 24
# Warm-up fills allocator pools, prefix cache and thread pools: growth counts from its end.
WARM_UP_REQUESTS = 100
MEMORY_GROWTH_BYTES = 64 * 1024 * 1024


def footprint(server: LocalServer) -> dict[str, float]:
    """Processes, threads, descriptors and resident bytes of the server's whole process tree."""
    tree = [psutil.Process(server.process.pid)]
    tree += tree[0].children(recursive=True)
    return {
        "processes": len(tree),
        "threads": sum(process.num_threads() for process in tree),
        "descriptors": sum(process.num_fds() for process in tree),
        "memory": sum(process.memory_info().rss for process in tree),
    }


async def mixed_load(target: str, *, requests: int, seed: int) -> int:
    """Runs that many requests, about a third of them dropped in mid-stream; returns how many ended whole."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(CONCURRENCY)
    ended = 0

    async def one(client: AsyncClient) -> None:
        nonlocal ended
        prompt = [rng.randrange(2, BASE["vocab_size"]) for _ in range(rng.randint(1, 120))]
        tokens, stop_after = rng.randint(1, 60), rng.choice([None, None, rng.randint(0, 20)])
        options = {"temperature": rng.choice([0.0, 0.8]), "n": rng.choice([1, 1, 1, 3]), "ignore_eos": True}
        if rng.random() < 0.3:
            options |= {"top_p": 0.9, "repetition_penalty": 1.1}
        async with gate:
            stream = client.generate(prompt, max_tokens=tokens, **options)
            received = 0
            async for chunk in stream:
                received += len(chunk.token_ids)
                if stop_after is not None and received > stop_after:
                    stream.cancel()
                    return
            assert all(sample.completion_tokens == tokens for sample in stream.completion.samples)
            ended += 1

    async with AsyncClient(target) as client:
        outcomes = await asyncio.gather(*(one(client) for _ in range(requests)), return_exceptions=True)
    unexpected = [o for o in outcomes if o is not None and "CANCELLED" not in str(o)]
    assert not unexpected, unexpected[:3]
    return ended


async def wait_until_idle(target: str) -> None:
    async with AsyncClient(target) as client, asyncio.timeout(20):
        while (load := await client.load()).running or load.waiting or load.kv_blocks_used:
            await asyncio.sleep(0.1)


@pytest.mark.timeout(1800)
def test_a_soak_with_cancels_leaves_nothing_behind(tmp_path: Path) -> None:
    """P14 and the leak part of item "Soak": no block, process, descriptor or thread is left, memory is flat."""
    checkpoint = make_checkpoint(tmp_path / "model")
    options = ["--dtype", "float32", "--max-num-seqs", "16", "--kv-cache-memory", "2M", "--max-model-len", "256"]
    with LocalServer(checkpoint, tp=2, device="cpu", options=options) as server:
        asyncio.run(mixed_load(server.target, requests=WARM_UP_REQUESTS, seed=1))
        asyncio.run(wait_until_idle(server.target))
        before = footprint(server)
        ended = asyncio.run(mixed_load(server.target, requests=SOAK_REQUESTS, seed=2))
        asyncio.run(wait_until_idle(server.target))
        after = footprint(server)
        with Client(server.target) as client:
            assert client.load().kv_blocks_used == 0
    print(f"{SOAK_REQUESTS} requests, {ended} ended whole; before {before}, after {after}")
    assert ended > SOAK_REQUESTS / 3
    assert after["processes"] == before["processes"]
    assert after["threads"] <= before["threads"] + 4
    assert after["descriptors"] <= before["descriptors"] + 8
    assert after["memory"] <= before["memory"] + MEMORY_GROWTH_BYTES
