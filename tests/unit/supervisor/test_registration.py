"""The supervisor's registration with the engine, over real gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

from tpmodel.v1 import worker_pb2, worker_pb2_grpc
from tpmodel_worker.auth import Expected, TokenInterceptor
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.settings import ServeSettings
from tpmodel_worker.supervisor.leader_lookup import KnownLeader, Leader, NamedLeader
from tpmodel_worker.supervisor.lifecycle import Ending
from tpmodel_worker.supervisor.registration import Registration

TOKEN = "token"


class Engine(worker_pb2_grpc.GangServiceServicer):
    """Notes who registers; may be slow, or refuse."""

    def __init__(self, instance: str) -> None:
        self.instance = instance
        self.requests: list[worker_pb2.RegisterRequest] = []
        self.drains: list[str] = []
        self.release = asyncio.Event()
        self.release.set()
        self.refusal = ""
        self.refusal_metadata: tuple[tuple[str, str], ...] = ()
        self.phases: asyncio.Queue[worker_pb2.Phase.ValueType] = asyncio.Queue()

    async def Register(  # noqa: N802
        self, request: worker_pb2.RegisterRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RegisterResponse:
        self.requests.append(request)
        if self.refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, self.refusal, self.refusal_metadata)
        await self.release.wait()
        return worker_pb2.RegisterResponse(instance_id=self.instance)

    async def Follow(  # noqa: N802
        self, request: worker_pb2.FollowRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[worker_pb2.EngineState]:
        while True:
            yield worker_pb2.EngineState(instance_id=self.instance, phase=await self.phases.get())

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.DrainResponse:
        self.drains.append(request.pod_uid)
        return worker_pb2.DrainResponse()

    async def Rebuild(  # noqa: N802
        self, request: worker_pb2.RebuildRequest, context: grpc.aio.ServicerContext
    ) -> worker_pb2.RebuildResponse:
        raise AssertionError("no supervisor asks for this")


@contextlib.asynccontextmanager
async def serving(engine: Engine, port: int = 0, address: str = "127.0.0.1") -> AsyncIterator[int]:
    server = grpc.aio.server(interceptors=[TokenInterceptor(Expected.gang_token(TOKEN))])
    worker_pb2_grpc.add_GangServiceServicer_to_server(engine, server)
    bound = server.add_insecure_port(f"{address}:{port}")
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


class Pod:
    """What there is to register, and what the registration tells its pod."""

    def __init__(self) -> None:
        self.ports: list[int] | None = [1]
        self.leader: Leader = KnownLeader("127.0.0.1")
        self.phases: list[worker_pb2.Phase.ValueType] = []
        self.changes = 0
        self.endings: list[Ending] = []

    def request(self) -> worker_pb2.RegisterRequest | None:
        if self.ports is None:
            return None
        ranks = [worker_pb2.RankAddress(rank=rank, port=port) for rank, port in enumerate(self.ports)]
        return worker_pb2.RegisterRequest(pod_uid="local", ranks=ranks)

    def changed(self) -> None:
        self.changes += 1


@contextlib.asynccontextmanager
async def registering(port: int, pod: Pod, attempt: int = 2) -> AsyncIterator[Registration]:
    registration = Registration(
        pod.leader,
        ServeSettings(
            model_path="/here", model_id="m", served_name="m", token=TOKEN, control_port=port, attempt=attempt
        ),
        request=pod.request,
        on_state=lambda state: pod.phases.append(state.phase),
        on_change=pod.changed,
        end_pod=pod.endings.append,
    )
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


async def test_a_pod_is_registered_until_the_connection_breaks() -> None:
    engine, pod = Engine("first"), Pod()
    async with contextlib.AsyncExitStack() as stack:
        async with serving(engine) as port:
            registration = await stack.enter_async_context(registering(port, pod))
            assert not registration.registered
            await until(lambda: registration.registered)
            assert registration.leader_address == "127.0.0.1"
        await until(lambda: not registration.registered)
    assert pod.changes >= 2


async def test_the_engines_state_is_followed() -> None:
    engine, pod = Engine("first"), Pod()
    async with serving(engine) as port, registering(port, pod):
        for phase in (worker_pb2.PHASE_FORMING, worker_pb2.PHASE_SERVING):
            engine.phases.put_nowait(phase)
        await until(lambda: len(pod.phases) == 2)
    assert pod.phases == [worker_pb2.PHASE_FORMING, worker_pb2.PHASE_SERVING]


async def test_a_pod_of_a_lower_attempt_ends_as_stale() -> None:
    engine, pod = Engine("next"), Pod()
    engine.refusal, engine.refusal_metadata = "no", (("tpmodel-attempt", "3"),)
    async with serving(engine) as port, registering(port, pod):
        await until(lambda: pod.endings)
    cause = "stale attempt: the gang is at attempt 3, this pod is of attempt 2"
    assert pod.endings[0] == Ending(ExitCode.RESTART_GANG, cause)


async def test_an_engine_of_a_lower_attempt_is_waited_past() -> None:
    """The old leader still answers under the name: its successor is found there later."""
    old, new, pod = Engine("old"), Engine("new"), Pod()
    old.refusal, old.refusal_metadata = "no", (("tpmodel-attempt", "1"),)
    async with contextlib.AsyncExitStack() as stack:
        async with serving(old) as port:
            registration = await stack.enter_async_context(registering(port, pod))
            await until(lambda: len(old.requests) == 2)
            assert not registration.registered
        async with serving(new, port):
            await until(lambda: registration.registered)
    assert pod.endings == []


async def test_pods_with_different_checkpoints_restart_the_gang() -> None:
    engine, pod = Engine("first"), Pod()
    engine.refusal, engine.refusal_metadata = "no", (("tpmodel-model-path", "/there"),)
    async with serving(engine) as port, registering(port, pod):
        await until(lambda: pod.endings)
    cause = "the pods of this gang have different checkpoints: /here here, /there in the leader pod"
    assert pod.endings[0] == Ending(ExitCode.RESTART_GANG, cause)


async def test_a_pod_that_knows_no_leader_finds_it_once_its_name_resolves() -> None:
    """A pod that comes back under a new address while the name service answers NXDOMAIN."""
    engine, pod, known = Engine("first"), Pod(), asyncio.Event()

    def resolve(_host: str, _family: socket.AddressFamily) -> list[str]:
        if not known.is_set():
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["127.0.0.1"]

    pod.leader = NamedLeader("leader", family=socket.AF_INET, resolve=resolve)
    async with serving(engine) as port, registering(port, pod) as registration:
        await asyncio.sleep(1.2)
        assert engine.requests == []
        known.set()
        await until(lambda: registration.registered, seconds=2)


async def test_a_leader_that_moved_is_followed_though_the_old_one_answers() -> None:
    old, new, pod, addresses = Engine("old"), Engine("new"), Pod(), ["127.0.0.1"]
    pod.leader = NamedLeader(
        "leader", family=socket.AF_INET, resolve=lambda _host, _family: list(addresses), watch_seconds=0.1
    )
    async with serving(old) as port, serving(new, port, "127.0.0.2"), registering(port, pod) as registration:
        await until(lambda: registration.registered)
        addresses[:] = ["127.0.0.2"]
        await until(lambda: new.requests)
        assert new.requests[0].instance_id_seen == "old"
        await until(lambda: registration.leader_address == "127.0.0.2")


async def test_a_drain_is_told_to_the_engine_that_the_pod_is_registered_with() -> None:
    engine, pod = Engine("first"), Pod()
    async with serving(engine) as port, registering(port, pod) as registration:
        await until(lambda: registration.registered)
        assert await registration.drain()
    assert engine.drains == ["local"]


async def test_a_drain_cannot_be_told_to_nobody() -> None:
    pod = Pod()
    pod.ports = None
    async with registering(1, pod) as registration:
        assert not await registration.drain()
