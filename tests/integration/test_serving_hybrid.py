"""The whole server with a model that keeps recurrent state: slots, memory and blocks under pressure, and a rebuild.

Its experts are whole on a rank each: what a rank maps again after its death includes them.
"""

from __future__ import annotations

import asyncio
import math
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass

import grpc
import pytest

from support.checkpoints import ARCHITECTURES, HYBRID, WHOLE_EXPERTS, make_checkpoint, random_prompts
from support.devices import DEVICES
from support.local_servers import metric
from support.oracle import Reference, TieLedger
from support.waiting import until
from tpmodel import AsyncClient, Client
from tpmodel.channel import RetryPolicy
from tpmodel.local import LocalServer
from tpmodel.v1 import worker_pb2, worker_pb2_grpc

TP, SLOTS, BLOCK, BLOCKS, TOKENS = 2, 3, 4, 96, 80
STEP_TOKENS, SNAPSHOTS = 96, 5
DISTANCE = 16 * BLOCK
"""Tokens between two snapshots of a sequence, at least."""


def state_parts() -> tuple[int, int]:
    """Bytes of one sequence's features and matrices in three linear-attention layers on each of two ranks, float32."""
    key_heads, value_heads = HYBRID["linear_num_key_heads"] // TP, HYBRID["linear_num_value_heads"] // TP
    key_dim, value_dim = HYBRID["linear_key_head_dim"], HYBRID["linear_value_head_dim"]
    features = 3 * (2 * key_heads * key_dim + value_heads * value_dim)
    return 3 * 4 * features, 3 * 4 * value_heads * key_dim * value_dim


def state_bytes(places: int) -> int:
    """Of so many slots and snapshots; both parts rounded up to 256 bytes."""
    return sum(math.ceil(places * part / 256) * 256 for part in state_parts())


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


@dataclass(frozen=True, slots=True)
class Served:
    """A server, what it should answer, and its ties."""

    server: LocalServer
    reference: Reference
    ledger: TieLedger


@pytest.fixture(scope="module", params=DEVICES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("hybrid"), **ARCHITECTURES["qwen3_next"] | WHOLE_EXPERTS)
    reference = Reference(checkpoint)
    memory = state_bytes(SLOTS + SNAPSHOTS) + (BLOCKS + 1) * block_bytes()
    options = ["--dtype", "float32", "--max-num-seqs", str(SLOTS), "--kv-cache-memory", str(memory)]
    options += ["--block-size", str(BLOCK), "--state-snapshots", str(SNAPSHOTS)]
    options += ["--max-model-len", "256", "--max-num-batched-tokens", str(STEP_TOKENS), "--log-format", "text"]
    options += ["--expert-parallel", "--recovery", "in-place"]
    if request.param == "cuda":
        options.append("--share-devices")
    with LocalServer(checkpoint, tp=TP, device=request.param, options=options) as server:
        # Whoever wanted to read weights again could not.
        (checkpoint / "model.safetensors").unlink()
        yield Served(server, reference, TieLedger())


def test_the_memory_of_blocks_and_states_is_planned_together_and_reported_at_start(served: Served) -> None:
    """What --kv-cache-memory leaves beside the states of all slots and snapshots is blocks."""
    blocks = f"{BLOCKS} KV blocks of {BLOCK} tokens"
    states = f"recurrent state of {SLOTS} sequences takes {state_bytes(SLOTS)} bytes of each rank, beside the KV blocks"
    states += f"; {SNAPSHOTS} snapshots of it for the prefix cache take {sum(state_parts())} bytes each"
    # Lines of several processes: that the server is ready may be read before what the engine has said.
    until(lambda: blocks in served.server.output and states in served.server.output, "the engine reports both", 30)
    assert (served.server.output.count(blocks), served.server.output.count(states)) == (1, 1)


def test_slots_blocks_and_clients_come_and_go(served: Served) -> None:
    """Prompts in chunks, preemption, cancels, several samples and repeated prompts.

    There are blocks for fewer than all slots' sequences.
    """
    prompts = random_prompts(8, shortest=60, longest=170, vocabulary=512, seed=11)
    assert max(len(prompt) for prompt in prompts) > STEP_TOKENS
    server = served.server
    answers = asyncio.run(under_pressure(server.target, prompts))
    again = asyncio.run(under_pressure(server.target, prompts[:2]))
    assert metric(f"{server.http_url}/metrics", "tpmodel_preemptions_total") > 0
    assert metric(f"{server.http_url}/metrics", "tpmodel_prefix_cache_hits_total") > 0
    for index, prompt in enumerate(prompts):
        served.reference.check_greedy(prompt, answers[index], served.ledger, what=f"prompt {index}")
    assert again == answers[:2]


def test_each_turn_of_a_chat_goes_on_behind_the_prompt_of_the_last(served: Served) -> None:
    """Its recurrent state comes from a snapshot; so does that of another chat with the same beginning."""
    (prompt, question), turns = random_prompts(2, shortest=70, longest=90, vocabulary=512, seed=13), []
    with Client(served.server.target) as client:
        for turn in range(3):
            answer = client.complete(prompt, max_tokens=12, temperature=0, ignore_eos=True)
            turns.append((prompt, answer.token_ids[0], answer.completion.usage.cached_tokens))
            prompt = [*prompt, *answer.token_ids[0], *question[: 8 + turn]]
        other = [*turns[0][0], *question]
        answer = client.complete(other, max_tokens=12, temperature=0, ignore_eos=True)
        turns.append((other, answer.token_ids[0], answer.completion.usage.cached_tokens))
    for turn, (prompt, tokens, _) in enumerate(turns):
        served.reference.check_greedy(prompt, tokens, served.ledger, what=f"turn {turn}")
    assert turns[0][2] == 0
    for _, _, cached in turns[1:]:
        assert cached >= DISTANCE
        assert cached % BLOCK == 0


def gang_status(server: LocalServer) -> worker_pb2.GangStatusResponse:
    with grpc.insecure_channel(server.health_target) as channel:
        return worker_pb2_grpc.StatusServiceStub(channel).GangStatus(worker_pb2.GangStatusRequest(), timeout=10)


def rank_1(server: LocalServer) -> int:
    """Its process id."""
    return next(process.pid for process in gang_status(server).processes if process.name == "rank 1")


async def with_a_rank_killed(server: LocalServer, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Every prompt's greedy tokens over connections that never resume; rank 1 dies amid the first answer."""
    victim = rank_1(server)
    async with AsyncClient(server.target, retry=RetryPolicy(window=0)) as client:

        async def answer(prompt: list[int], kill_after: int) -> tuple[int, ...]:
            stream = client.generate(prompt, max_tokens=160, temperature=0, ignore_eos=True)
            chunks = 0
            async for _ in stream:
                chunks += 1
                if chunks == kill_after:
                    os.kill(victim, signal.SIGKILL)
            return (await stream.result()).token_ids[0]

        return list(await asyncio.gather(*(answer(prompt, 6 * (not place)) for place, prompt in enumerate(prompts))))


def test_streams_go_on_with_their_tokens_when_a_rank_dies(served: Served) -> None:
    """P17: the world is rebuilt in place, states are computed anew; running, half-computed and waiting requests."""
    prompts = random_prompts(5, shortest=30, longest=90, vocabulary=512, seed=12)
    answers = asyncio.run(with_a_rank_killed(served.server, prompts))
    (rebuild,) = gang_status(served.server).engine.last_rebuilds
    assert rebuild.replayed_requests >= 2
    for index, prompt in enumerate(prompts):
        assert len(answers[index]) == 160
        served.reference.check_greedy(prompt, answers[index], served.ledger, what=f"prompt {index}")


def test_snapshots_of_a_world_that_is_gone_are_not_used_in_the_next(served: Served) -> None:
    """W26, P17: one rank has lost them, the others' are as good as lost."""
    server, answers = served.server, []
    (prompt,) = random_prompts(1, shortest=90, longest=90, vocabulary=512, seed=14)
    with Client(server.target) as client:

        def cached_tokens() -> int:
            answer = client.complete(prompt, max_tokens=12, temperature=0, ignore_eos=True)
            answers.append(answer.token_ids[0])
            return answer.completion.usage.cached_tokens

        assert [cached_tokens(), cached_tokens()] == [0, 88]
        epoch = gang_status(server).engine.epoch
        os.kill(rank_1(server), signal.SIGKILL)
        until(lambda: gang_status(server).engine.epoch > epoch, "another world is built", 60)
        assert [cached_tokens(), cached_tokens()] == [0, 88]
    served.reference.check_greedy(prompt, answers[0], served.ledger, what="before")
    assert answers == answers[:1] * 4
