"""The front socket: batches for each api process, and nothing that an api process can block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tpmodel.v1 import inference_pb2, pod_pb2, worker_pb2
from tpmodel_worker.engine.front import Front, Key
from tpmodel_worker.engine.requests import Admitted, QueueFullError, Request, SequenceOutput
from tpmodel_worker.engine.status import EngineStatus
from tpmodel_worker.framing import frame, read_message

LIMIT = 1 << 20


class Handler:
    """Notes what it is told; refuses when asked to."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.cancelled: list[tuple[Key, int | None]] = []
        self.full = False
        self.happened = asyncio.Event()

    def submit(self, request: Request) -> None:
        self.happened.set()
        if self.full:
            raise QueueFullError("3 requests wait already")
        self.requests.append(request)

    def cancel(self, key: Key, sample_index: int | None = None) -> bool:
        self.happened.set()
        self.cancelled.append((key, sample_index))
        return True

    async def next(self) -> None:
        async with asyncio.timeout(5.0):
            await self.happened.wait()
        self.happened.clear()


class ApiProcess:
    """A client of the front socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: Path) -> ApiProcess:
        process = cls(*await asyncio.open_unix_connection(str(path)))
        first = await process.receive()
        assert first.HasField("state")
        return process

    def submit(self, handle: int, *, n: int = 1, weight_version: int | None = None) -> None:
        submit = pod_pb2.SubmitRequest(
            handle=handle,
            request_id=f"r{handle}",
            prompt_token_ids=[1, 2, 3],
            sampling=worker_pb2.SlotSampling(max_tokens=5, seed=9),
            n=n,
            priority=-1,
            weight_version=weight_version,
        )
        self.writer.write(frame(pod_pb2.FrontRequest(submit=submit)))

    def cancel(self, handle: int, sample_index: int | None = None) -> None:
        cancel = pod_pb2.CancelRequest(handle=handle, sample_index=sample_index)
        self.writer.write(frame(pod_pb2.FrontRequest(cancel=cancel)))

    async def receive(self) -> pod_pb2.FrontResponse:
        async with asyncio.timeout(5.0):
            message = await read_message(self.reader, pod_pb2.FrontResponse)
        assert message is not None
        return message


@pytest.fixture
def status() -> EngineStatus:
    return EngineStatus("engine-1", 1, "model", 64)


@pytest.fixture
def handler() -> Handler:
    return Handler()


@pytest.fixture
async def front(tmp_path: Path, handler: Handler, status: EngineStatus) -> AsyncIterator[Front]:
    made = Front(tmp_path / "front.sock", handler, status, max_outgoing_bytes=LIMIT)
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def api(front: Front, tmp_path: Path) -> AsyncIterator[ApiProcess]:
    process = await ApiProcess.connect(tmp_path / "front.sock")
    yield process
    process.writer.close()


async def test_request_arrives_as_it_was_sent(api: ApiProcess, handler: Handler) -> None:
    api.submit(7, n=2)
    await handler.next()
    (request,) = handler.requests
    assert (request.request_id, request.n, request.priority, request.deadline) == ("r7", 2, -1, None)
    assert list(request.prompt_token_ids) == [1, 2, 3]
    assert request.sampling.seed == 9


async def test_step_is_one_message_for_each_api_process(
    api: ApiProcess, front: Front, handler: Handler, tmp_path: Path
) -> None:
    other = await ApiProcess.connect(tmp_path / "front.sock")
    api.submit(1)
    await handler.next()
    api.submit(2)
    await handler.next()
    other.submit(1)
    await handler.next()
    keys = [request.key for request in handler.requests]
    logprobs = [worker_pb2.TokenLogprobs(logprob=-0.5)]
    front.deliver(
        [
            SequenceOutput(keys[0], 0, admitted=Admitted(cached_tokens=2, weight_version=4)),
            SequenceOutput(keys[0], 0, [11], logprobs),
            SequenceOutput(keys[2], 0, [33]),
            SequenceOutput(keys[1], 0, [22], finish_reason=inference_pb2.FINISH_REASON_LENGTH),
        ]
    )
    mine = (await api.receive()).outputs.outputs
    assert [(output.handle, list(output.token_ids)) for output in mine] == [(1, []), (1, [11]), (2, [22])]
    assert (mine[0].admitted.cached_tokens, mine[0].admitted.weight_version) == (2, 4)
    assert mine[1].logprobs[0].logprob == -0.5
    assert mine[2].finish_reason == inference_pb2.FINISH_REASON_LENGTH
    theirs = (await other.receive()).outputs.outputs
    assert [(output.handle, list(output.token_ids)) for output in theirs] == [(1, [33])]
    other.writer.close()


async def test_refusal_is_told_with_its_code(api: ApiProcess, handler: Handler) -> None:
    handler.full = True
    api.submit(3)
    (output,) = (await api.receive()).outputs.outputs
    assert (output.handle, output.error.code, output.error.message) == (3, 8, "3 requests wait already")


async def test_stream_of_other_weights_is_refused(api: ApiProcess, handler: Handler, status: EngineStatus) -> None:
    status.set_weight_version(5)
    assert (await api.receive()).state.weight_version == 5
    api.submit(1, weight_version=4)
    (output,) = (await api.receive()).outputs.outputs
    assert output.error.code == 9
    assert output.error.message == "the stream needs weight version 4, this gang serves 5"
    api.submit(2, weight_version=5)
    await handler.next()
    assert len(handler.requests) == 1


async def test_cancelled_request_brings_nothing_more(api: ApiProcess, front: Front, handler: Handler) -> None:
    api.submit(1)
    await handler.next()
    api.submit(2)
    await handler.next()
    api.cancel(1)
    await handler.next()
    first, second = (request.key for request in handler.requests)
    assert handler.cancelled == [(first, None)]
    front.deliver([SequenceOutput(first, 0, [1]), SequenceOutput(second, 0, [2])])
    assert [output.handle for output in (await api.receive()).outputs.outputs] == [2]


async def test_one_sample_can_be_cancelled(api: ApiProcess, front: Front, handler: Handler) -> None:
    api.submit(1, n=2)
    await handler.next()
    api.cancel(1, 0)
    await handler.next()
    key = handler.requests[0].key
    assert handler.cancelled == [(key, 0)]
    front.deliver([SequenceOutput(key, 1, [5])])
    assert [output.sample_index for output in (await api.receive()).outputs.outputs] == [1]


async def test_lost_connection_cancels_its_live_requests(api: ApiProcess, front: Front, handler: Handler) -> None:
    for handle in (1, 2, 3):
        api.submit(handle)
        await handler.next()
    keys = [request.key for request in handler.requests]
    front.deliver(
        [
            SequenceOutput(keys[0], 0, finish_reason=inference_pb2.FINISH_REASON_STOP),
            SequenceOutput(keys[1], 0, error=(4, "late")),
        ]
    )
    await api.receive()
    api.writer.close()
    await handler.next()
    assert handler.cancelled == [(keys[2], None)]
    front.deliver([SequenceOutput(keys[2], 0, [1])])


async def test_api_process_that_does_not_read_is_dropped_and_never_waited_for(
    api: ApiProcess, front: Front, handler: Handler
) -> None:
    api.submit(1)
    await handler.next()
    key = handler.requests[0].key
    output = SequenceOutput(key, 0, list(range(50_000)))
    for _ in range(100):
        front.deliver([output])
    await handler.next()
    assert handler.cancelled == [(key, None)]


async def test_nonsense_drops_the_connection(api: ApiProcess, handler: Handler) -> None:
    api.submit(1)
    await handler.next()
    api.writer.write((4).to_bytes(4, "little") + b"\xff\xff\xff\xff")
    await handler.next()
    assert handler.cancelled == [(handler.requests[0].key, None)]


async def test_changed_state_is_told(api: ApiProcess, status: EngineStatus) -> None:
    status.set_phase(worker_pb2.PHASE_SERVING)
    assert (await api.receive()).state.phase == worker_pb2.PHASE_SERVING
