"""The link from a rank to its supervisor."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from support.rank_link import RankLink
from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.client import ArenaClient
from tpmodel_worker.arenas.errors import ArenaLinkError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena

CPU = torch.device("cpu")
WEIGHTS = ArenaId(0, "weights")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[RankLink]:
    with RankLink(tmp_path / "rank.sock") as holder:
        yield holder


@pytest.fixture
def client(holder: RankLink) -> Iterator[ArenaClient]:
    with ArenaClient(holder.path, timeout_seconds=5.0) as client:
        yield client


def test_hello_brings_rank_pid_and_port_and_returns_the_instance(holder: RankLink, client: ArenaClient) -> None:
    assert client.hello(2, 1234, 5678) == "engine-1"
    (hello,) = holder.hellos()
    assert (hello.rank, hello.pid, hello.port) == (2, 1234, 5678)


def test_instance_id_is_the_present_one_and_is_no_second_hello(holder: RankLink, client: ArenaClient) -> None:
    client.hello(0, 1, 2)
    holder.instance_id = "engine-2"
    assert client.instance_id() == "engine-2"
    assert len(holder.hellos()) == 1


def test_stored_arena_is_fetched_with_its_manifest_and_memory(client: ArenaClient) -> None:
    arena = Arena.create(WEIGHTS, 5000, CPU)
    arena.bytes[4000] = 9
    client.store(arena, worker_pb2.ArenaManifest(state=worker_pb2.ARENA_STATE_LOADING, model_id="m"))
    arena.close()

    fetched = client.fetch(WEIGHTS)
    assert fetched is not None
    descriptor, manifest = fetched
    assert (manifest.bytes, manifest.device, manifest.model_id) == (8192, "cpu", "m")
    assert ArenaId.from_proto(manifest.id) == WEIGHTS
    assert not os.get_inheritable(descriptor)
    again = Arena.map(WEIGHTS, descriptor, manifest.bytes, CPU)
    assert again.bytes[4000] == 9
    again.close()


def test_fetch_of_an_unknown_arena_is_none(client: ArenaClient) -> None:
    assert client.fetch(ArenaId(0, "kv")) is None


def test_manifest_is_replaced_and_release_forgets(client: ArenaClient) -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    client.store(arena, worker_pb2.ArenaManifest())
    manifest = worker_pb2.ArenaManifest(id=WEIGHTS.to_proto(), bytes=4096, state=worker_pb2.ARENA_STATE_COMPLETE)
    client.update_manifest(manifest)
    fetched = client.fetch(WEIGHTS)
    assert fetched is not None
    assert fetched[1].state == worker_pb2.ARENA_STATE_COMPLETE
    os.close(fetched[0])
    client.release(WEIGHTS)
    assert client.fetch(WEIGHTS) is None
    arena.close()


def test_refusal_is_an_error_and_the_link_lives_on(client: ArenaClient) -> None:
    with pytest.raises(ArenaLinkError, match="update_manifest: the supervisor refused: no weights arena 0 of rank 0"):
        client.update_manifest(worker_pb2.ArenaManifest(id=WEIGHTS.to_proto()))
    assert client.instance_id() == "engine-1"


def test_abort_news_carry_epoch_and_deadline(holder: RankLink, client: ArenaClient) -> None:
    client.abort_started(1 << 32 | 5, 2.5)
    client.abort_done(1 << 32 | 5)
    started, done = holder.requests
    assert (started.abort_started.epoch, started.abort_started.deadline_seconds) == (1 << 32 | 5, 2.5)
    assert done.abort_done.epoch == 1 << 32 | 5


def test_silent_supervisor_is_an_error_after_the_deadline_and_then_at_once(holder: RankLink) -> None:
    holder.silent = True
    with ArenaClient(holder.path, timeout_seconds=0.2) as client:
        with pytest.raises(ArenaLinkError, match="hello: the supervisor did not answer"):
            client.hello(0, 1, 2)
        holder.silent = False
        started = time.monotonic()
        with pytest.raises(ArenaLinkError, match="of no use any more"):
            client.instance_id()
        assert time.monotonic() - started < 0.1


def test_supervisor_that_is_gone_is_an_error(holder: RankLink, client: ArenaClient, tmp_path: Path) -> None:
    client.hello(0, 1, 2)
    holder.disconnect()
    with pytest.raises(ArenaLinkError, match="did not answer"):
        client.hello(0, 1, 2)
    with pytest.raises(ArenaLinkError, match="no supervisor at"):
        ArenaClient(tmp_path / "nobody.sock")


def test_threads_share_one_link(client: ArenaClient) -> None:
    arenas = [Arena.create(ArenaId(rank, "kv"), 4096, CPU) for rank in range(8)]

    def store_and_fetch(arena: Arena) -> None:
        arena.bytes.fill_(arena.id.rank)
        for _ in range(10):
            client.store(arena, worker_pb2.ArenaManifest())
            fetched = client.fetch(arena.id)
            assert fetched is not None
            mapped = Arena.map(arena.id, fetched[0], fetched[1].bytes, CPU)
            assert mapped.bytes.eq(arena.id.rank).all()
            mapped.close()
        arena.close()

    with ThreadPoolExecutor(4) as threads:
        for future in [threads.submit(store_and_fetch, arena) for arena in arenas]:
            future.result(20)


def test_wait_until_closed_returns_when_the_supervisor_goes(holder: RankLink, client: ArenaClient) -> None:
    client.hello(0, 1, 2)
    waiting = threading.Thread(target=client.wait_until_closed, daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    holder.disconnect()
    waiting.join(5)
    assert not waiting.is_alive()
