"""Real ranks, real gRPC sessions: greedy output against transformers, with two plans outstanding."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from support.checkpoints import ARCHITECTURES, make_checkpoint, random_prompts
from support.oracle import Reference, TieLedger
from support.rank_gang import RankGang, World, admission, new_world
from tpmodel.v1 import worker_pb2 as pb

BLOCK = 8
VOCABULARY = 523  # not divisible by 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab_size=VOCABULARY)


@pytest.fixture(
    scope="module", params=[("cpu", 1), ("cpu", 2), pytest.param(("cuda", 2), marks=pytest.mark.gpu)], ids=str
)
def gang(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGang]:
    device, world_size = request.param
    gang = RankGang(tmp_path_factory.mktemp("gang"), world_size, device=device)
    yield gang
    gang.close()


def load_request(checkpoint: Path) -> pb.LoadDenseShardRequest:
    return pb.LoadDenseShardRequest(
        model_id="test",
        config_json=(checkpoint / "config.json").read_text(),
        safetensors_paths=[str(checkpoint / "model.safetensors")],
        load_format="safetensors",
        max_model_len=128,
        max_num_seqs=8,
        max_num_batched_tokens=128,
        block_size=BLOCK,
        kv_cache_bytes=8 << 20,
    )


@pytest.fixture
async def world(gang: RankGang, checkpoint: Path) -> AsyncIterator[World]:
    async with new_world(gang) as world:
        await world.build(load_request(checkpoint))
        yield world


class Sequences:
    """Plans for some prompts, each with blocks of its own from the start, and their outputs."""

    def __init__(self, world: World, prompts: list[list[int]], *, max_tokens: int) -> None:
        self.world = world
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.outputs: list[list[int]] = [[] for _ in prompts]
        self.blocks = -(-max(len(prompt) + max_tokens for prompt in prompts) // BLOCK)

    def admit_all(self) -> pb.GenerateStepRequest:
        """Admits and prefills everything in one step."""
        slots = range(len(self.prompts))
        return pb.GenerateStepRequest(
            admissions=[admission(slot, self.prompts[slot], max_tokens=self.max_tokens) for slot in slots],
            block_table_deltas=[
                pb.BlockTableDelta(slot=slot, blocks=range(slot * self.blocks, (slot + 1) * self.blocks))
                for slot in slots
            ],
            prefill_chunks=[pb.PrefillChunk(slot=slot, length=len(self.prompts[slot])) for slot in slots],
            steps=1,
        )

    def decode(self, steps: int) -> pb.GenerateStepRequest:
        return pb.GenerateStepRequest(decode_slots=range(len(self.prompts)), steps=steps)

    async def receive(self) -> pb.GenerateStepOk:
        """Rank 0's next step."""
        response = await self.world.sessions[0].receive()
        assert response.HasField("generate_step_ok"), response
        reply = response.generate_step_ok
        for slot, token_id in zip(reply.slots, reply.token_ids, strict=True):
            self.outputs[slot].append(token_id)
        return reply


async def test_greedy_matches_transformers_with_two_plans_outstanding(world: World, checkpoint: Path) -> None:
    """P10: rank 0 sends every token, other ranks none; checksums agree when settled (P11)."""
    prompts = random_prompts(5, shortest=1, longest=20, vocabulary=VOCABULARY, seed=1)
    sequences = Sequences(world, prompts, max_tokens=33)
    plans = [sequences.admit_all(), *(sequences.decode(steps) for steps in (8, 1, 8, 8, 7))]
    for plan in plans[:2]:
        await world.plan(plan)
    for index, plan in enumerate(plans):
        for _ in range(plan.steps):
            await sequences.receive()
        if index + 2 < len(plans):
            await world.plan(plans[index + 2])
    settled = await world.settle()

    assert {reply.generate_step_ok.checksum for reply in settled} == {settled[0].generate_step_ok.checksum}
    assert settled[0].generate_step_ok.checksum != 0
    assert all(not reply.generate_step_ok.token_ids for reply in settled)
    assert [len(output) for output in sequences.outputs] == [33] * len(prompts)
    ledger = TieLedger()
    reference = Reference(checkpoint)
    for index, (prompt, output) in enumerate(zip(prompts, sequences.outputs, strict=True)):
        reference.check_greedy(prompt, output, ledger, what=f"prompt {index}")


async def test_a_stop_id_ends_a_sequence_in_the_middle_of_a_plan(world: World) -> None:
    """P14: its slot and blocks take another sequence with the next plan."""
    prompts = random_prompts(2, shortest=6, longest=9, vocabulary=VOCABULARY, seed=2)
    free = Sequences(world, prompts, max_tokens=12)
    await world.plan(free.admit_all())
    await world.plan(free.decode(8))
    for _ in range(9):
        await free.receive()
    stop = free.outputs[0][4]
    stopped = Sequences(world, prompts, max_tokens=12)
    plan = stopped.admit_all()
    plan.admissions[0].sampling.stop_token_ids.extend([stop, VOCABULARY - 1])
    plan.releases.extend([0, 1])
    await world.plan(plan)
    await world.plan(stopped.decode(8))
    replies = [await stopped.receive() for _ in range(9)]
    length = free.outputs[0].index(stop) + 1
    assert stopped.outputs == [free.outputs[0][:length], free.outputs[1]]
    assert list(replies[length - 1].finished) == [pb.FINISHED_STOP, 0]
    assert list(replies[length].slots) == [1]


async def test_chunks_prefix_hits_and_block_copies_give_the_same_tokens(world: World) -> None:
    """A prompt in chunks beside a decoding slot; another that shares its first block and copies its second."""
    (prompt,) = random_prompts(1, shortest=13, longest=13, vocabulary=VOCABULARY, seed=5)
    steps = Sequences(world, [prompt, prompt], max_tokens=6)
    await world.plan(
        pb.GenerateStepRequest(
            admissions=[admission(0, prompt, max_tokens=6)],
            block_table_deltas=[pb.BlockTableDelta(slot=0, blocks=[7, 3, 9])],
            prefill_chunks=[pb.PrefillChunk(slot=0, length=5)],
            steps=1,
        )
    )
    await world.plan(pb.GenerateStepRequest(prefill_chunks=[pb.PrefillChunk(slot=0, length=8)], steps=1))
    assert not (await steps.receive()).slots
    await steps.receive()
    await world.plan(
        pb.GenerateStepRequest(
            admissions=[admission(1, prompt, max_tokens=6, computed_length=12)],
            block_table_deltas=[pb.BlockTableDelta(slot=1, blocks=[7, 5, 1])],
            block_copies=[pb.BlockCopy(source=3, target=5)],
            decode_slots=[0],
            prefill_chunks=[pb.PrefillChunk(slot=1, length=1)],
            steps=1,
        )
    )
    await world.plan(steps.decode(5))
    for _ in range(6):
        await steps.receive()
    assert len(steps.outputs[0]) == len(steps.outputs[1]) == 6
    assert steps.outputs[0] == steps.outputs[1]


async def test_snapshots_of_recurrent_state_are_made_on_every_rank_and_gone_once_the_cache_is_emptied(
    gang: RankGang, tmp_path: Path
) -> None:
    """P10, P14: a rank that has none refuses the plan like all others, before anything is computed."""
    checkpoint = make_checkpoint(tmp_path / "hybrid", **ARCHITECTURES["qwen3_5"])
    load = load_request(checkpoint)
    load.state_snapshots = 2
    first, second = random_prompts(2, shortest=2 * BLOCK + 5, longest=2 * BLOCK + 5, vocabulary=512, seed=6)
    second = first[: 2 * BLOCK] + second[2 * BLOCK :]
    behind = pb.GenerateStepRequest(
        admissions=[admission(1, second, max_tokens=9, computed_length=2 * BLOCK, state_snapshot=1)],
        block_table_deltas=[pb.BlockTableDelta(slot=1, blocks=[0, 1, 5, 6])],
        prefill_chunks=[pb.PrefillChunk(slot=1, length=5)],
        steps=1,
    )
    async with new_world(gang) as world:
        loaded = await world.build(load, state_snapshots=2)
        assert [reply.load_dense_shard_ok.state_snapshots_available for reply in loaded] == [2] * len(loaded)
        steps = Sequences(world, [first, second], max_tokens=9)
        await world.plan(
            pb.GenerateStepRequest(
                admissions=[admission(0, first, max_tokens=9)],
                block_table_deltas=[pb.BlockTableDelta(slot=0, blocks=[0, 1, 2, 3])],
                prefill_chunks=[pb.PrefillChunk(slot=0, length=2 * BLOCK)],
                steps=1,
                state_saves=[pb.StateSave(slot=0, snapshot=1)],
            )
        )
        await world.plan(pb.GenerateStepRequest(prefill_chunks=[pb.PrefillChunk(slot=0, length=5)], steps=1))
        await steps.receive()
        await steps.receive()
        await world.plan(behind)
        await world.plan(steps.decode(8))
        for _ in range(9):
            await steps.receive()
        settled = await world.settle()
        assert len({reply.generate_step_ok.checksum for reply in settled}) == 1
        reference, ledger = Reference(checkpoint), TieLedger()
        for prompt, output in zip((first, second), steps.outputs, strict=True):
            assert len(output) == 9
            reference.check_greedy(prompt, output, ledger, what=f"prompt of {len(prompt)}")
        cleared = await world.control(clear_kv_cache=pb.ClearKvCacheRequest())
        assert all(reply.HasField("kv_cache_cleared") for reply in cleared)
        await world.plan(behind)
        refusals = [(await session.receive()).error for session in world.sessions]
        assert {refusal.kind for refusal in refusals} == {pb.ERROR_KIND_INVALID_PLAN}
        (message,) = {refusal.message for refusal in refusals}
        assert f"snapshot 1 was not made behind the sequence's first {2 * BLOCK} tokens" in message
