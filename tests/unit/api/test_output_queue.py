"""What waits for a client is joined, bounded in bytes, and never blocks the link."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from tpmodel.v1 import inference_pb2, pod_pb2
from tpmodel_worker.api.engine_link import EngineLink, OutputQueue
from tpmodel_worker.api.errors import ApiError, unavailable


async def test_outputs_of_a_sample_are_joined_in_order() -> None:
    queue = OutputQueue(limit_bytes=1000)
    queue.put(pod_pb2.Output(admitted=pod_pb2.Admitted(cached_tokens=3)))
    for token_id in (1, 2):
        queue.put(pod_pb2.Output(token_ids=[token_id]))
        queue.put(pod_pb2.Output(sample_index=1, token_ids=[token_id + 10]))
    queue.put(pod_pb2.Output(token_ids=[3], finish_reason=inference_pb2.FINISH_REASON_LENGTH))
    first, second = await queue.take()
    assert (list(first.token_ids), first.finish_reason, first.admitted.cached_tokens) == ([1, 2, 3], 2, 3)
    assert (second.sample_index, list(second.token_ids), second.HasField("admitted")) == (1, [11, 12], False)


async def test_take_waits_for_the_next_output() -> None:
    queue = OutputQueue(limit_bytes=1000)
    taking = asyncio.create_task(queue.take())
    await asyncio.sleep(0)
    assert not taking.done()
    queue.put(pod_pb2.Output(token_ids=[1]))
    assert [list(output.token_ids) for output in await taking] == [[1]]


async def test_a_slow_client_ends_with_resource_exhausted() -> None:
    queue = OutputQueue(limit_bytes=100)
    accepted = [queue.put(pod_pb2.Output(token_ids=[7])) for _ in range(100)]
    assert accepted.index(False) == accepted.count(True)
    assert 1 < accepted.count(True) < 100
    with pytest.raises(ApiError) as failure:
        await queue.take()
    assert failure.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_keeps_up_is_not_bounded() -> None:
    queue = OutputQueue(limit_bytes=100)
    for _ in range(100):
        assert queue.put(pod_pb2.Output(token_ids=[7]))
        await queue.take()


async def test_what_arrived_before_a_failure_is_given_out_first() -> None:
    queue = OutputQueue(limit_bytes=1000)
    queue.put(pod_pb2.Output(token_ids=[1]))
    queue.fail(unavailable("gone"))
    assert len(await queue.take()) == 1
    with pytest.raises(ApiError, match="gone"):
        await queue.take()


def test_without_a_connection_nothing_is_accepted(tmp_path: Path) -> None:
    """W22: work before the build."""
    link = EngineLink(tmp_path / "front.sock")
    assert not link.serving
    with pytest.raises(ApiError, match="world not built yet") as failure:
        link.check_accepting()
    assert failure.value.code == grpc.StatusCode.UNAVAILABLE


async def test_the_engines_error_becomes_the_requests() -> None:
    queue = OutputQueue(limit_bytes=1000)
    assert not queue.put(pod_pb2.Output(error=pod_pb2.RequestError(code=8, message="queue full")))
    with pytest.raises(ApiError, match="queue full") as failure:
        await queue.take()
    assert failure.value.code == grpc.StatusCode.RESOURCE_EXHAUSTED
