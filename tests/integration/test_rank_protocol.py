"""Real ranks, real gRPC sessions: the rules of WorkerService, at tp 1 and 2."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from support.checkpoints import make_checkpoint
from support.rank_gang import RankGang, RankSession, World, admission, new_world
from tpmodel.v1 import worker_pb2 as pb
from tpmodel.v1 import worker_pb2_grpc

STUCK_SECONDS = 0.5
"""Long enough to be inside a collective."""


@pytest.fixture(scope="module")
def load_request(tmp_path_factory: pytest.TempPathFactory) -> pb.LoadDenseShardRequest:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("checkpoint"), vocab_size=300, num_hidden_layers=2)
    return pb.LoadDenseShardRequest(
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


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGang]:
    gang = RankGang(tmp_path_factory.mktemp("gang"), 2)
    yield gang
    gang.close()


@pytest.fixture
async def world(gang: RankGang) -> AsyncIterator[World]:
    async with new_world(gang) as world:
        yield world


def prefill(slot: int = 0, *, max_tokens: int = 9) -> pb.GenerateStepRequest:
    return pb.GenerateStepRequest(
        admissions=[admission(slot, [5, 6, 7], max_tokens=max_tokens)],
        block_table_deltas=[pb.BlockTableDelta(slot=slot, blocks=[0, 1])],
        prefill_chunks=[pb.PrefillChunk(slot=slot, length=3)],
        steps=1,
    )


def errors(replies: list[pb.SessionResponse]) -> list[int]:
    return [reply.error.kind if reply.HasField("error") else 0 for reply in replies]


def _shared_bytes(pid: int) -> int:
    """Bytes of shared memory (and so of arenas) that a process has in use."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssShmem:")[1].split()[0]) * 1024


async def refusal(session: RankSession) -> grpc.StatusCode:
    """The code with which a session ends that is not accepted."""
    code = await asyncio.wait_for(session.call.code(), 5.0)
    await session.close()
    return code


class TestSession:
    async def test_an_unknown_request_gets_an_error_and_the_session_lives_on(self, world: World) -> None:
        """P1"""
        for session in world.sessions:
            response = await session.control()
            assert response.error.kind == pb.ERROR_KIND_UNKNOWN_OP
        assert errors(await world.init()) == [0, 0]

    async def test_a_message_of_an_older_epoch_gets_stale_epoch(self, world: World) -> None:
        """W25"""
        session = world.sessions[0]
        await session.send_raw(pb.SessionRequest(epoch=world.epoch - 1, seq=1, unload_model=pb.UnloadModelRequest()))
        response = await session.receive()
        assert response.error.kind == pb.ERROR_KIND_STALE_EPOCH
        assert (await session.control(unload_model=pb.UnloadModelRequest())).HasField("unloaded")

    async def test_a_second_session_of_the_epoch_is_refused_and_the_first_lives_on(
        self, gang: RankGang, world: World
    ) -> None:
        await world.sessions[0].opened()
        assert await refusal(RankSession(gang, 0, world.epoch)) is grpc.StatusCode.ALREADY_EXISTS
        assert (await world.sessions[0].control(unload_model=pb.UnloadModelRequest())).HasField("unloaded")

    async def test_an_older_session_is_refused(self, gang: RankGang, world: World) -> None:
        """W25"""
        await world.sessions[0].opened()
        assert await refusal(RankSession(gang, 0, world.epoch - 1)) is grpc.StatusCode.FAILED_PRECONDITION

    async def test_a_newer_session_replaces_the_older_one(self, gang: RankGang, world: World) -> None:
        """W26: the rank leaves the older world, whatever it is stuck in, and builds the newer one."""
        await world.init()
        await world.sessions[0].send(nccl_sanity_check=pb.NcclSanityCheckRequest())
        await asyncio.sleep(STUCK_SECONDS)
        async with new_world(gang) as newer:
            assert errors(await newer.init()) == [0, 0]
            assert errors(await newer.control(nccl_sanity_check=pb.NcclSanityCheckRequest())) == [0, 0]
            assert (await world.sessions[0].receive()).error.kind == pb.ERROR_KIND_ABORTED
            for session in world.sessions:
                assert await asyncio.wait_for(session.call.code(), 5.0) is grpc.StatusCode.OK

    async def test_an_epoch_that_is_no_number_is_refused(self, gang: RankGang) -> None:
        session = RankSession(gang, 0, 0)
        assert await refusal(session) is grpc.StatusCode.INVALID_ARGUMENT

    async def test_calls_without_the_token_are_refused(self, gang: RankGang) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{gang.ports[0]}") as channel:
            stub: Any = worker_pb2_grpc.WorkerServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Ping(pb.PingRequest(), metadata=(("authorization", "Bearer wrong"),))
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED

    async def test_a_closed_session_frees_a_rank_that_is_stuck_in_a_collective(
        self, gang: RankGang, world: World
    ) -> None:
        await world.init()
        await world.sessions[0].send(nccl_sanity_check=pb.NcclSanityCheckRequest())
        await asyncio.sleep(STUCK_SECONDS)
        await world.close()
        async with new_world(gang) as newer:
            assert errors(await newer.init()) == [0, 0]


class TestInit:
    async def test_all_ranks_join_and_the_sum_is_the_world_size(self, world: World) -> None:
        """P6, P8"""
        replies = await world.init()
        assert [reply.init_ok.communicator for reply in replies] == ["shared_memory"] * 2
        sums = await world.control(nccl_sanity_check=pb.NcclSanityCheckRequest())
        assert [reply.nccl_sanity_result.observed_sum for reply in sums] == [2.0, 2.0]

    async def test_building_twice_changes_nothing(self, world: World) -> None:
        """W18"""
        await world.init()
        assert errors(await world.init()) == [0, 0]
        sums = await world.control(nccl_sanity_check=pb.NcclSanityCheckRequest())
        assert [reply.nccl_sanity_result.observed_sum for reply in sums] == [2.0, 2.0]

    async def test_work_before_init_is_refused(self, world: World, load_request: pb.LoadDenseShardRequest) -> None:
        """P8, P9, W22"""
        sanity = await world.control(nccl_sanity_check=pb.NcclSanityCheckRequest())
        load = await world.control(load_dense_shard=load_request)
        clear = await world.control(clear_kv_cache=pb.ClearKvCacheRequest(num_blocks=4))
        assert errors(sanity) == errors(load) == errors(clear) == [pb.ERROR_KIND_NCCL_NOT_INITIALISED] * 2

    async def test_the_wrong_rank_is_refused(self, world: World) -> None:
        """P5, P6"""
        response = await world.sessions[0].control(init=world.init_request(1))
        assert response.error.kind == pb.ERROR_KIND_INVALID_ARGUMENT
        assert "this is rank 0" in response.error.message

    async def test_a_missing_rank_fails_the_others_and_the_next_epoch_works(self, gang: RankGang, world: World) -> None:
        """P6, W19"""
        request = world.init_request(0)
        request.timeout_seconds = 1.0
        response = await world.sessions[0].control(init=request)
        assert response.error.kind == pb.ERROR_KIND_COMMUNICATOR
        assert "rank 1" in response.error.message
        async with new_world(gang) as newer:
            assert errors(await newer.init()) == [0, 0]

    async def test_another_engine_than_the_registered_one_is_refused(self, gang: RankGang, world: World) -> None:
        gang.link.instance_id = "somebody else"
        try:
            replies = await world.init()
        finally:
            gang.link.instance_id = ""
        assert errors(replies) == [pb.ERROR_KIND_WRONG_INSTANCE] * 2


class TestAbort:
    async def test_abort_releases_a_rank_stuck_in_a_plan_which_joins_a_newer_epoch(
        self, gang: RankGang, world: World, load_request: pb.LoadDenseShardRequest
    ) -> None:
        """P5, P11, W26"""
        await world.build(load_request)
        stuck = world.sessions[0]
        seq = await stuck.send(generate_step=prefill())
        await asyncio.sleep(STUCK_SECONDS)
        ping = await stuck.stub.Ping(pb.PingRequest(), metadata=stuck.metadata, timeout=1.0)
        assert (ping.rank, ping.epoch) == (0, world.epoch)
        status = await stuck.stub.GetStatus(pb.GetStatusRequest(), metadata=stuck.metadata, timeout=1.0)
        assert status.state == "serving"

        started = time.monotonic()
        await world.abort()
        assert time.monotonic() - started < 1.0
        response = await stuck.receive()
        assert (response.seq, response.error.kind) == (seq, pb.ERROR_KIND_ABORTED)
        assert ("started", world.epoch) in gang.link.aborts
        assert ("done", world.epoch) in gang.link.aborts

        async with new_world(gang) as newer:
            loaded = await newer.build(load_request)
            assert [(reply.load_dense_shard_ok.bytes_read, reply.load_dense_shard_ok.mapped) for reply in loaded] == [
                (0, True)
            ] * 2
            await newer.plan(prefill())
            response = await newer.sessions[0].receive()
            assert len(response.generate_step_ok.token_ids) == 1

    async def test_abort_releases_a_rank_that_waits_for_the_others_to_join(self, gang: RankGang, world: World) -> None:
        session = world.sessions[0]
        await session.send(init=world.init_request(0))
        await asyncio.sleep(STUCK_SECONDS)
        started = time.monotonic()
        await session.stub.Abort(pb.AbortRequest(epoch=world.epoch), metadata=session.metadata, timeout=5.0)
        assert time.monotonic() - started < 1.0
        assert (await session.receive()).error.kind == pb.ERROR_KIND_ABORTED
        async with new_world(gang) as newer:
            assert errors(await newer.init()) == [0, 0]

    async def test_an_aborted_epoch_takes_no_session(self, gang: RankGang, world: World) -> None:
        """W25"""
        await world.init()
        await world.abort()
        await world.abort()
        for epoch in (world.epoch, world.epoch - 1):
            assert await refusal(RankSession(gang, 0, epoch)) is grpc.StatusCode.FAILED_PRECONDITION
        status = await world.sessions[0].stub.GetStatus(
            pb.GetStatusRequest(), metadata=world.sessions[0].metadata, timeout=1.0
        )
        assert (status.epoch, status.state) == (world.epoch, "aborted")

    async def test_what_is_asked_after_an_abort_is_answered(self, world: World) -> None:
        """P1"""
        await world.init()
        await world.abort()
        replies = await world.control(unload_model=pb.UnloadModelRequest())
        assert errors(replies) == [pb.ERROR_KIND_ABORTED] * 2

    async def test_aborting_an_older_epoch_changes_nothing(self, world: World) -> None:
        """W25"""
        await world.init()
        session = world.sessions[0]
        await session.stub.Abort(pb.AbortRequest(epoch=world.epoch - 1), metadata=session.metadata, timeout=5.0)
        assert errors(await world.control(nccl_sanity_check=pb.NcclSanityCheckRequest())) == [0, 0]


class TestModel:
    async def test_an_unknown_model_type_lists_the_supported_ones(
        self, world: World, load_request: pb.LoadDenseShardRequest
    ) -> None:
        """P9, P7: the session answers what follows."""
        await world.init()
        request = pb.LoadDenseShardRequest()
        request.CopyFrom(load_request)
        request.config_json = '{"model_type": "abacus"}'
        replies = await world.control(load_dense_shard=request)
        assert errors(replies) == [pb.ERROR_KIND_UNSUPPORTED_MODEL] * 2
        assert "qwen3" in replies[0].error.message
        assert "abacus" in replies[0].error.message
        await world.control(load_dense_shard=load_request)

    async def test_a_missing_file_is_a_bad_checkpoint_on_the_rank_that_misses_it(
        self, world: World, load_request: pb.LoadDenseShardRequest, tmp_path: Path
    ) -> None:
        """P7, P9"""
        await world.init()
        request = pb.LoadDenseShardRequest()
        request.CopyFrom(load_request)
        request.model_id = "another"
        request.safetensors_paths[:] = [str(tmp_path / "gone.safetensors")]
        bad, good = await asyncio.gather(
            world.sessions[0].control(load_dense_shard=request),
            world.sessions[1].control(load_dense_shard=load_request),
        )
        assert bad.error.kind == pb.ERROR_KIND_BAD_CHECKPOINT
        assert "gone.safetensors" in bad.error.message
        assert good.HasField("load_dense_shard_ok")
        assert errors(await world.control(unload_model=pb.UnloadModelRequest())) == [0, 0]

    async def test_loading_reports_progress_and_sizes(
        self, world: World, load_request: pb.LoadDenseShardRequest
    ) -> None:
        await world.init()
        await world.control(unload_model=pb.UnloadModelRequest())
        session = world.sessions[0]
        other = asyncio.create_task(world.sessions[1].control(load_dense_shard=load_request))
        seq = await session.send(load_dense_shard=load_request)
        progress: list[pb.Progress] = []
        while (response := await session.call.read()).HasField("progress"):
            assert response.seq == seq
            progress.append(response.progress)
        ok = response.load_dense_shard_ok
        assert {"weights", "digest"} >= {report.what for report in progress}
        assert progress
        assert all(0 <= report.done_bytes <= report.total_bytes for report in progress)
        assert ok.bytes_read > 0
        # 2 layers, keys and values, 8 tokens, 2 KV heads of 4, 16 dimensions, float32.
        assert ok.kv_block_bytes == 2 * 2 * 8 * 2 * 16 * 4
        assert ok.kv_blocks_available == (4 << 20) // ok.kv_block_bytes - 1
        await other

    @pytest.mark.parametrize("size", [1000, 1 << 60])
    async def test_a_cache_size_that_can_never_work_is_refused_with_the_numbers(
        self, world: World, load_request: pb.LoadDenseShardRequest, size: int
    ) -> None:
        await world.init()
        changed = pb.LoadDenseShardRequest()
        changed.CopyFrom(load_request)
        changed.kv_cache_bytes = size
        replies = await world.control(load_dense_shard=changed)
        assert errors(replies) == [pb.ERROR_KIND_INVALID_ARGUMENT] * 2
        assert str(size) in replies[0].error.message

    async def test_a_cache_that_cannot_be_had_is_out_of_memory(
        self, world: World, load_request: pb.LoadDenseShardRequest
    ) -> None:
        await world.init()
        await world.control(load_dense_shard=load_request)
        replies = await world.control(clear_kv_cache=pb.ClearKvCacheRequest(num_blocks=1 << 28))
        assert errors(replies) == [pb.ERROR_KIND_OUT_OF_MEMORY] * 2
        assert errors(await world.control(clear_kv_cache=pb.ClearKvCacheRequest(num_blocks=8))) == [0, 0]

    async def test_unload_gives_the_memory_back_and_steps_after_it_fail(
        self, gang: RankGang, world: World, load_request: pb.LoadDenseShardRequest
    ) -> None:
        """P15"""
        config = json.loads(load_request.config_json) | {"vocab_size": 100_000}
        large = pb.LoadDenseShardRequest()
        large.CopyFrom(load_request)
        large.load_format, large.config_json, large.safetensors_paths[:] = "dummy", json.dumps(config), []
        # Two layers hold less than an embedding and a head of 50,000 rows of 64.
        least = 2 * 50_000 * 64 * 4
        await world.control(unload_model=pb.UnloadModelRequest())
        shared = [_shared_bytes(process.pid) for process in gang.processes]
        await world.build(large, num_blocks=1000)
        held = [gang.link.held(rank) for rank in range(2)]
        loaded = [_shared_bytes(process.pid) for process in gang.processes]
        replies = await world.control(unload_model=pb.UnloadModelRequest())
        for rank, reply in enumerate(replies):
            assert reply.unloaded.freed_bytes == held[rank]["weights"] + held[rank]["kv"]
            assert not {"weights", "kv"} & gang.link.held(rank).keys()
            assert loaded[rank] >= shared[rank] + least
            assert _shared_bytes(gang.processes[rank].pid) <= loaded[rank] - least
        await world.plan(prefill())
        for session in world.sessions:
            response = await session.receive()
            assert response.error.kind == pb.ERROR_KIND_MODEL_NOT_LOADED
            assert "no model is loaded" in response.error.message
        replies = await world.control(unload_model=pb.UnloadModelRequest())
        assert [reply.unloaded.freed_bytes for reply in replies] == [0, 0]


class TestPlans:
    @pytest.fixture
    async def serving(self, world: World, load_request: pb.LoadDenseShardRequest) -> World:
        await world.build(load_request)
        return world

    async def test_all_ranks_refuse_an_invalid_plan_alike_and_before_a_collective(self, serving: World) -> None:
        """P10, P11"""
        await serving.plan(pb.GenerateStepRequest(decode_slots=[0], steps=1))
        replies = [await session.receive() for session in serving.sessions]
        assert errors(replies) == [pb.ERROR_KIND_INVALID_PLAN] * 2
        assert replies[0].error.message == replies[1].error.message
        assert "slot 0 cannot decode" in replies[0].error.message
        await serving.plan(prefill())
        replies = [await session.receive() for session in serving.sessions]
        assert errors(replies) == [pb.ERROR_KIND_ABORTED] * 2
        cleared = await serving.control(clear_kv_cache=pb.ClearKvCacheRequest())
        assert [reply.kv_cache_cleared.num_blocks for reply in cleared] == [64, 64]
        await serving.plan(prefill())
        assert (await serving.sessions[0].receive()).HasField("generate_step_ok")

    async def test_a_control_request_before_the_plans_are_settled_is_refused(self, serving: World) -> None:
        """P11"""
        await serving.plan(prefill())
        session = serving.sessions[1]
        response = await session.control(unload_model=pb.UnloadModelRequest())
        assert response.error.kind == pb.ERROR_KIND_OUT_OF_ORDER

    async def test_other_ranks_answer_after_50_ms_without_tokens(self, serving: World) -> None:
        """P10, P11"""
        seq = await serving.plan(prefill())
        first, other = [await session.receive(1.0) for session in serving.sessions]
        assert (first.seq, first.generate_step_ok.slots) == (seq, [0])
        assert (other.seq, list(other.generate_step_ok.token_ids)) == (seq, [])
        assert other.generate_step_ok.checksum == first.generate_step_ok.checksum

    async def test_other_ranks_answer_many_plans_at_once(self, serving: World) -> None:
        """P11"""
        await serving.plan(prefill(max_tokens=40))
        await serving.plan(pb.GenerateStepRequest(block_table_deltas=[pb.BlockTableDelta(start=2, blocks=range(2, 8))]))
        for _ in range(38):
            await serving.plan(pb.GenerateStepRequest(decode_slots=[0], steps=1))
        last = await serving.plan(pb.GenerateStepRequest(ack_now=True))
        answered: list[int] = []
        while not answered or answered[-1] < last:
            answered.append((await serving.sessions[1].receive()).seq)
        assert answered == sorted(answered)
        assert len(answered) < 20

    async def test_the_kv_cache_is_sized_and_emptied(self, serving: World) -> None:
        """P14"""
        await serving.plan(prefill())
        await serving.settle()
        cleared = await serving.control(clear_kv_cache=pb.ClearKvCacheRequest(num_blocks=20))
        assert [reply.kv_cache_cleared.num_blocks for reply in cleared] == [20, 20]
        session = serving.sessions[1]
        status = await session.stub.GetStatus(pb.GetStatusRequest(), metadata=session.metadata, timeout=1.0)
        assert (status.kv_blocks, status.slots_used, status.state) == (20, 0, "serving")
        await serving.plan(prefill())
        assert errors([await session.receive() for session in serving.sessions]) == [0, 0]


class TestLife:
    async def test_shutdown_says_bye_and_the_processes_end(
        self, tmp_path: Path, load_request: pb.LoadDenseShardRequest
    ) -> None:
        """P16; P3: and a rank whose supervisor is gone ends by itself."""
        gang = RankGang(tmp_path, 2)
        try:
            world = World(gang, 1)
            await world.build(load_request)
            bye = await world.sessions[0].control(shutdown=pb.ShutdownRequest())
            assert bye.HasField("bye")
            assert await asyncio.to_thread(gang.processes[0].wait, 10) == 0
            assert gang.processes[1].poll() is None
            gang.link.close()
            assert await asyncio.to_thread(gang.processes[1].wait, 10) != 0
            await world.close()
        finally:
            gang.close()
