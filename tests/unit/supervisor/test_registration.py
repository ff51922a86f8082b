"""The supervisor's registration with the engine, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import TokenInterceptor
from tpmodel_worker.supervisor.registration import Registration

TOKEN = "token"


class Engine(worker_pb2_grpc.GangServiceServicer):
    """Notes who registers; may be slow, or refuse."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.requests: list[worker_pb2.RegisterRequest] = []
        self.release = asyncio.Event()
        self.release.set()
        self.refusal = ""

    async def Register(  # noqa: N802
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        self.requests.append(request)
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal)
        await self.release.wait()
        return worker_pb2.RegisterResponse(instance_id=self.instance)

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        return worker_pb2.DrainResponse()


@contextlib.asynccontextmanager
async def serving(engine: Engine, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=[TokenInterceptor(TOKEN)])
    worker_pb2_grpc.add_GangServiceServicer_to_server(engine, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


class Pod:
    """What there is to register."""

    def __init__(self) -> None:
        self.ports: list[int] | None = [1]

    def request(self) -> worker_pb2.RegisterRequest | None:
        if self.ports is None:
            return None
        ranks = [worker_pb2.RankAddress(rank=rank, port=port) for rank, port in enumerate(self.ports)]
        return worker_pb2.RegisterRequest(pod_uid="local", ranks=ranks)


@contextlib.asynccontextmanager
async def registering(port: int, pod: Pod) -> AsyncIterator[Registration]:
    registration = Registration(f"127.0.0.1:{port}", TOKEN, pod.request)
    task = asyncio.create_task(registration.run())
    try:
        yield registration
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_registers_once_and_remembers_the_instance() -> None:
    engine = Engine("first")
    async with serving(engine) as port, registering(port, Pod()) as registration:
        await until(lambda: engine.requests)
        assert await registration.instance_id() == "first"
        await asyncio.sleep(0.7)
    assert len(engine.requests) == 1
    assert engine.requests[0].instance_id_seen == ""


async def test_registers_again_when_something_changed() -> None:
    engine, pod = Engine("first"), Pod()
    async with serving(engine) as port, registering(port, pod) as registration:
        await until(lambda: engine.requests)
        pod.ports = [1, 2]
        registration.changed()
        await until(lambda: len(engine.requests) == 2)
    assert [address.port for address in engine.requests[1].ranks] == [1, 2]
    assert engine.requests[1].instance_id_seen == "first"


async def test_says_nothing_before_there_is_something_to_say() -> None:
    engine, pod = Engine("first"), Pod()
    pod.ports = None
    async with serving(engine) as port, registering(port, pod) as registration:
        await asyncio.sleep(0.3)
        assert engine.requests == []
        pod.ports = [1]
        registration.changed()
        await until(lambda: engine.requests)


async def test_registers_with_the_next_engine_when_the_connection_breaks() -> None:
    first, second = Engine("first"), Engine("second")
    async with serving(first) as port:
        async with contextlib.AsyncExitStack() as stack:
            registration = await stack.enter_async_context(registering(port, Pod()))
            await until(lambda: first.requests)
            moved = stack.pop_all()
    async with moved, serving(second, port):
        await until(lambda: second.requests)
        assert second.requests[0].instance_id_seen == "first"
        assert await registration.instance_id() == "second"


async def test_tries_on_while_it_is_refused_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine("first")
    engine.refusal = "attempt 1 is not 2"
    async with serving(engine) as port, registering(port, Pod()) as registration:
        await until(lambda: len(engine.requests) == 3)
        assert await registration.instance_id() == ""
        engine.refusal = ""
        await until(lambda: len(engine.requests) == 4)
    assert caplog.text.count("attempt 1 is not 2") == 1


async def test_who_asks_for_the_instance_during_a_call_waits_for_its_end() -> None:
    """The engine may send Init to a rank before its answer to Register has arrived here."""
    engine = Engine("first")
    engine.release.clear()
    async with serving(engine) as port, registering(port, Pod()) as registration:
        await until(lambda: engine.requests)
        asking = asyncio.create_task(registration.instance_id())
        await asyncio.sleep(0.1)
        assert not asking.done()
        engine.release.set()
        assert await asyncio.wait_for(asking, 5) == "first"
