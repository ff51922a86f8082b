"""The rank socket: who may speak, what for, and what is kept."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from tpmodel.v1 import pod_pb2, worker_pb2
from tpmodel_worker.arenas.identity import SPARE_RANK
from tpmodel_worker.framing import receive_message, send_message
from tpmodel_worker.supervisor.memory import MemoryHolder
from tpmodel_worker.supervisor.processes import Process, ProcessExit, ProcessTable
from tpmodel_worker.supervisor.rank_link import RankLinkServer


class Link:
    """The server, with this test's own process in the place of rank 1."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rank.sock"
        self.memory = MemoryHolder()
        self.instance = "engine-1"
        self.hellos: list[tuple[int, int, int]] = []
        self.spares: list[tuple[int, int]] = []
        self.server = RankLinkServer(
            self.path,
            self.memory,
            instance_id=self._instance_id,
            on_hello=self._note_hello,
            on_spare=lambda process, held: self.spares.append((process.pid, held)),
        )

    async def _instance_id(self) -> str:
        return self.instance

    def _note_hello(self, rank: int, process: Process, port: int) -> None:
        self.hellos.append((rank, process.pid, port))

    async def expect_self(self, rank: int = 1) -> None:
        await self.server.expect(rank, Process(f"rank {rank}", os.getpid(), [], lambda: 0))

    async def call(
        self, request: pod_pb2.RankLinkRequest, descriptors: tuple[int, ...] = ()
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]] | None:
        return await asyncio.wait_for(asyncio.to_thread(self._call, request, descriptors), 10)

    def _call(
        self, request: pod_pb2.RankLinkRequest, descriptors: tuple[int, ...]
    ) -> tuple[pod_pb2.RankLinkResponse, list[int]] | None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(self.path))
            send_message(connection, request, descriptors)
            return receive_message(connection, pod_pb2.RankLinkResponse)

    async def error(self, request: pod_pb2.RankLinkRequest, descriptors: tuple[int, ...] = ()) -> str:
        answer = await self.call(request, descriptors)
        assert answer is not None
        return answer[0].error


@pytest.fixture
async def link(tmp_path: Path) -> AsyncIterator[Link]:
    link = Link(tmp_path)
    await link.server.start()
    yield link
    await link.server.stop()
    link.memory.close()


def manifest(rank: int = 1) -> worker_pb2.ArenaManifest:
    return worker_pb2.ArenaManifest(id=worker_pb2.ArenaId(rank=rank, kind="weights"), bytes=8, model_id="m")


def store(rank: int = 1) -> pod_pb2.RankLinkRequest:
    return pod_pb2.RankLinkRequest(id=3, store_arena=pod_pb2.StoreArenaRequest(manifest=manifest(rank)))


def fetch(rank: int = 1) -> pod_pb2.RankLinkRequest:
    return pod_pb2.RankLinkRequest(id=4, fetch_arena=pod_pb2.FetchArenaRequest(arena=manifest(rank).id))


def memory() -> int:
    descriptor = os.memfd_create("arena")
    os.write(descriptor, b"contents")
    return descriptor


async def test_a_hello_is_passed_on_and_answered_with_the_instance(link: Link) -> None:
    await link.expect_self()
    hello = pod_pb2.RankHello(rank=1, pid=os.getpid(), port=5001)

    answer = await link.call(pod_pb2.RankLinkRequest(id=9, hello=hello))

    assert answer is not None
    assert (answer[0].id, answer[0].error, answer[0].instance_id) == (9, "", "engine-1")
    assert link.hellos == [(1, os.getpid(), 5001)]


@pytest.mark.parametrize(("rank", "other_pid"), [(0, False), (1, True)])
async def test_a_hello_for_another_is_refused(link: Link, rank: int, other_pid: bool) -> None:
    await link.expect_self()
    hello = pod_pb2.RankHello(rank=rank, pid=os.getpid() + other_pid, port=5001)
    assert "from the process that was forked as rank 1" in await link.error(pod_pb2.RankLinkRequest(hello=hello))
    assert link.hellos == []


async def test_a_process_that_was_not_forked_from_here_is_refused(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("tpmodel_worker.supervisor.rank_link._KNOWN_SECONDS", 0.05)
    try:
        answer = await link.call(fetch())
    except ConnectionError:
        answer = None
    assert answer is None
    assert f"process {os.getpid()} connected to the rank socket" in caplog.text


async def test_a_process_may_connect_before_it_is_known(link: Link) -> None:
    call = asyncio.create_task(link.call(fetch()))
    await asyncio.sleep(0.2)
    assert not call.done()
    await link.expect_self()
    assert await call is not None


async def test_memory_and_manifest_come_back_as_they_were_left(link: Link) -> None:
    await link.expect_self()
    descriptor = memory()
    assert await link.error(store(), (descriptor,)) == ""
    os.close(descriptor)

    answer = await link.call(fetch())

    assert answer is not None
    response, descriptors = answer
    assert response.manifest == manifest()
    assert os.pread(descriptors[0], 8, 0) == b"contents"
    os.close(descriptors[0])


async def test_an_arena_that_is_not_held_is_answered_without_manifest(link: Link) -> None:
    await link.expect_self()
    answer = await link.call(fetch())
    assert answer is not None
    assert not answer[0].HasField("manifest")
    assert (answer[0].error, answer[1]) == ("", [])


async def test_a_rank_reads_but_does_not_change_what_is_anothers(link: Link) -> None:
    await link.expect_self(rank=0)
    link.memory.store(manifest(), memory())
    update = pod_pb2.UpdateManifestRequest(manifest=manifest())
    release = pod_pb2.ReleaseArenaRequest(arena=manifest().id)

    assert "not rank 0's to change" in await link.error(pod_pb2.RankLinkRequest(update_manifest=update))
    assert "not rank 0's to change" in await link.error(pod_pb2.RankLinkRequest(release_arena=release))
    move = pod_pb2.MoveArenaRequest(arena=release.arena, to=1)
    assert "not rank 0's to change" in await link.error(pod_pb2.RankLinkRequest(move_arena=move))
    descriptor = memory()
    assert "not rank 0's to change" in await link.error(store(), (descriptor,))
    os.close(descriptor)
    answer = await link.call(fetch())
    assert answer is not None
    assert len(answer[1]) == 1
    os.close(answer[1][0])


async def test_descriptors_that_nobody_asked_for_are_closed(link: Link) -> None:
    await link.expect_self()
    before = psutil.Process().num_fds()
    descriptor = memory()
    assert await link.error(fetch(), (descriptor,)) == "1 descriptors came with the request, expected 0"
    assert await link.error(store()) == "0 descriptors came with the request, expected 1"
    os.close(descriptor)
    await asyncio.sleep(0.05)
    assert psutil.Process().num_fds() == before


async def test_a_request_that_is_none_is_refused(link: Link) -> None:
    await link.expect_self()
    assert await link.error(pod_pb2.RankLinkRequest(id=1)) == "unknown request"


async def test_release_frees_the_arena(link: Link) -> None:
    await link.expect_self()
    link.memory.store(manifest(), memory())
    release = pod_pb2.ReleaseArenaRequest(arena=manifest().id)
    assert await link.error(pod_pb2.RankLinkRequest(release_arena=release)) == ""
    assert link.memory.manifests == []


async def test_a_moved_arena_has_the_other_number(link: Link) -> None:
    """E46: nobody sees a moment at which the rank has no weights."""
    await link.expect_self()
    link.memory.store(manifest(), memory())
    move = pod_pb2.MoveArenaRequest(arena=manifest().id, to=3)
    assert await link.error(pod_pb2.RankLinkRequest(move_arena=move)) == ""
    assert [held.id.number for held in link.memory.manifests] == [3]
    assert "is not held here" in await link.error(pod_pb2.RankLinkRequest(move_arena=move))


async def test_the_deadman_kills_through_the_process_that_was_forked(link: Link, tmp_path: Path) -> None:
    """P17: a confirmed abort disarms it, one of an older epoch does not."""
    table = ProcessTable(lambda _name, _line: None)
    code = f"""
import time
from pathlib import Path
from tpmodel_worker.arenas.client import ArenaClient
link = ArenaClient(Path({str(link.path)!r}))
link.abort_started(5, 0.3)
link.abort_done(5)
time.sleep(0.6)
link.abort_started(6, 0.3)
link.abort_done(5)
time.sleep(30)
"""
    process = await table.execute("rank 1", [sys.executable, "-c", code])
    await link.server.expect(1, process)

    ended = await asyncio.wait_for(process.ended(), 15)

    assert ended.signal == 9


def await_promotion() -> pod_pb2.RankLinkRequest:
    return pod_pb2.RankLinkRequest(id=5, await_promotion=pod_pb2.AwaitPromotionRequest(device_bytes=512))


async def wait_for_spare(link: Link) -> None:
    async with asyncio.timeout(10):
        while not link.spares:
            await asyncio.sleep(0.01)


async def test_a_spare_is_answered_once_it_is_promoted_and_then_speaks_for_its_rank(link: Link) -> None:
    process = Process("spare", os.getpid(), [], lambda: 0)
    await link.server.expect(SPARE_RANK, process)
    waiting = asyncio.create_task(link.call(await_promotion()))
    await wait_for_spare(link)
    assert link.spares == [(os.getpid(), 512)]
    assert not waiting.done()

    await link.server.promote(process, 1)

    answer = await waiting
    assert answer is not None
    assert answer[0].promoted_to == 1
    hello = pod_pb2.RankHello(rank=1, pid=os.getpid(), port=7)
    assert await link.error(pod_pb2.RankLinkRequest(id=1, hello=hello)) == ""
    assert link.hellos == [(1, os.getpid(), 7)]


@pytest.mark.parametrize("rank", [1, SPARE_RANK])
async def test_a_spare_may_say_and_touch_nothing_before_its_promotion(link: Link, rank: int) -> None:
    await link.expect_self(SPARE_RANK)
    refusal = "a spare may only wait for its promotion"
    hello = pod_pb2.RankHello(rank=rank, pid=os.getpid(), port=7)
    assert await link.error(pod_pb2.RankLinkRequest(id=1, hello=hello)) == refusal
    descriptor = os.memfd_create("arena")
    try:
        os.ftruncate(descriptor, 8)
        assert await link.error(store(rank), (descriptor,)) == refusal
    finally:
        os.close(descriptor)
    assert (link.hellos, link.memory.manifests) == ([], [])


async def test_a_rank_cannot_wait_for_a_promotion(link: Link) -> None:
    await link.expect_self(1)
    assert await link.error(await_promotion()) == "unknown request"


async def test_a_spare_whose_process_has_ended_gets_no_answer(link: Link) -> None:
    process = Process("spare", os.getpid(), [], lambda: 0)
    await link.server.expect(SPARE_RANK, process)
    waiting = asyncio.create_task(link.call(await_promotion()))
    await wait_for_spare(link)

    process.exited.set_result(ProcessExit("spare", os.getpid(), None, 9))

    assert await waiting is None
    await link.server.promote(process, 1)
    assert link.hellos == []
