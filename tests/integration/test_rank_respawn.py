"""A rank process that was killed: its weights live on with the supervisor."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.checkpoints import make_checkpoint
from support.rank_gang import RankGang, World, admission, new_world
from tpmodel.v1 import worker_pb2 as pb

PROMPT = [5, 6, 7, 8, 9]


async def generate(world: World) -> list[int]:
    """Seven greedy tokens, and every rank's agreement on them."""
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
        response = await world.sessions[0].receive()
        assert response.HasField("generate_step_ok"), response
        tokens.extend(response.generate_step_ok.token_ids)
    settled = await world.settle()
    assert len({reply.generate_step_ok.checksum for reply in settled}) == 1
    return tokens


async def test_a_new_process_of_a_killed_rank_maps_the_weights_and_serves_without_files(tmp_path: Path) -> None:
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
    gang = RankGang(tmp_path, 2)
    try:
        async with new_world(gang) as world:
            loaded = await world.build(load)
            tokens = await generate(world)
            gang.kill(1)
            # Rank 0 is left alone in a collective.
            await world.sessions[0].send(generate_step=pb.GenerateStepRequest(decode_slots=[0], steps=1))
            await world.sessions[0].abort()
        shutil.rmtree(checkpoint)
        gang.respawn(1)
        async with new_world(gang) as world:
            again = await world.build(load)
            assert await generate(world) == tokens
        for before, after in zip(loaded, again, strict=True):
            assert before.load_dense_shard_ok.bytes_read > 0
            assert not before.load_dense_shard_ok.mapped
            assert after.load_dense_shard_ok.bytes_read == 0
            assert after.load_dense_shard_ok.mapped
            assert after.load_dense_shard_ok.digest == before.load_dense_shard_ok.digest
    finally:
        gang.close()
