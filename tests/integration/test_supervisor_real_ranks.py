"""Real ranks under a real supervisor, with this test in the place of the engine: fork, memory, respawn."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil
import pytest

from support.checkpoints import make_checkpoint
from support.ended import still_running
from support.rank_gang import World, admission
from support.supervised import METADATA, TOKEN, Supervised, stand_in_settings
from tpmodel.v1 import worker_pb2 as pb

if TYPE_CHECKING:
    from support.rank_gang import RankGang

PROMPT = [5, 6, 7, 8, 9]
FIRST_EPOCH = (1 << 32) | 1
"""Of attempt 1, which the pod is of."""
# A rank that was forked from an interpreter with torch in it is up in far less than an import takes.
FORK_SECONDS = 1.2


class Ranks:
    """What a World needs of a gang: the ranks as the supervisor last registered them."""

    world_size = 2
    token = TOKEN

    def __init__(self, pod: Supervised) -> None:
        event = pod.eventually(lambda: pod.events("register"), "a registration", seconds=60)[-1]
        self.ports = dict(enumerate(event["ports"]))
        self.rendezvous = event["rendezvous"]


@pytest.fixture
def pod(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Supervised]:
    """Its ranks come about as the parameter says, or by default."""
    settings = stand_in_settings(tmp_path, runtime_dir=str(tmp_path), respawn=getattr(request, "param", "fork"))
    pod = Supervised(tmp_path, settings, real_ranks=True)
    pod.steer(phase="LOADING", instance="engine")
    pod.start()
    try:
        yield pod
    finally:
        pod.stop()


def new_world(pod: Supervised, epoch: int) -> World:
    return World(cast("RankGang", Ranks(pod)), epoch)


def spare_of(pod: Supervised) -> int:
    """The pid of the spare, once it is ready."""
    ready = lambda: [p.pid for p in pod.gang_status().processes if (p.name, p.state) == ("spare", "running")]  # noqa: E731
    return pod.eventually(ready, "a spare")[0]


async def generate(world: World) -> list[int]:
    """Seven greedy tokens."""
    await world.plan(
        pb.GenerateStepRequest(
            admissions=[admission(0, PROMPT, max_tokens=7)],
            block_table_deltas=[pb.BlockTableDelta(slot=0, blocks=[3, 1])],
            prefill_chunks=[pb.PrefillChunk(slot=0, length=len(PROMPT))],
            steps=1,
        )
    )
    await world.plan(pb.GenerateStepRequest(decode_slots=[0], steps=6))
    tokens: list[int] = []
    while len(tokens) < 7:
        tokens.extend((await world.sessions[0].receive()).generate_step_ok.token_ids)
    await world.settle()
    return tokens


@pytest.mark.parametrize("pod", ["fork", "spare", "cold"], indirect=True)
async def test_a_respawned_rank_serves_from_the_memory_that_the_supervisor_held(
    pod: Supervised, tmp_path: Path
) -> None:
    """SIGKILL of a rank: its successor, whatever its kind, maps the arena and opens no file, since there is none any
    more."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", num_hidden_layers=2)
    load = pb.LoadDenseShardRequest(
        model_id="test",
        config_json=(checkpoint / "config.json").read_text(),
        safetensors_paths=[str(checkpoint / "model.safetensors")],
        load_format="safetensors",
        max_model_len=64,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=8,
        kv_cache_bytes=4 << 20,
    )
    world = new_world(pod, FIRST_EPOCH)
    loaded = await world.build(load)
    tokens = await generate(world)
    victim = pod.pid_of("rank 1")
    survivor = pod.pid_of("rank 0")
    waiting = spare_of(pod) if pod.settings.respawn == "spare" else None
    os.kill(victim, signal.SIGKILL)
    await world.sessions[0].abort()
    await world.close()
    shutil.rmtree(checkpoint)

    with pod.service() as stub:
        request = pb.RespawnRequest(rank=1, epoch=FIRST_EPOCH + 1)
        started = stub.Respawn(request, timeout=60, metadata=METADATA).started
    pod.eventually(lambda: pod.events("register")[-1]["ports"][1] == started.port, "the new rank is registered")
    world = new_world(pod, FIRST_EPOCH + 1)
    again = await world.build(load)

    assert await generate(world) == tokens
    await world.close()
    assert pod.pid_of("rank 0") == survivor
    assert started.pid != victim
    assert waiting in (None, started.pid)
    for before, after in zip(loaded, again, strict=True):
        assert not before.load_dense_shard_ok.mapped
        assert after.load_dense_shard_ok.mapped
        assert after.load_dense_shard_ok.bytes_read == 0
        assert after.load_dense_shard_ok.digest == before.load_dense_shard_ok.digest


def test_a_forked_rank_needs_no_import_of_its_own(pod: Supervised) -> None:
    Ranks(pod)
    with pod.service() as stub:
        stub.Respawn(pb.RespawnRequest(rank=0, epoch=FIRST_EPOCH), timeout=60, metadata=METADATA)
        process = psutil.Process(pod.pid_of("rank 0"))
        cpu = process.cpu_times()

    assert process.ppid() == pod.pid
    assert cpu.user + cpu.system < FORK_SECONDS


def test_nothing_outlives_a_killed_supervisor_of_real_ranks(pod: Supervised) -> None:
    """P3."""
    Ranks(pod)
    descendants = pod.descendants()
    assert len(descendants) == 6

    os.kill(pod.pid, signal.SIGKILL)

    assert still_running(descendants, 2) == []
