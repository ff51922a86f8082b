"""Arenas in the supervisor's hands."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.supervisor.memory import ArenaError, MemoryHolder


@pytest.fixture
def holder() -> Iterator[MemoryHolder]:
    holder = MemoryHolder()
    yield holder
    holder.close()


def manifest(rank: int = 0, kind: str = "weights", number: int = 0, size: int = 4096) -> worker_pb2.ArenaManifest:
    return worker_pb2.ArenaManifest(id=worker_pb2.ArenaId(rank=rank, kind=kind, number=number), bytes=size)


def memory(content: bytes = b"", size: int = 4096) -> int:
    descriptor = os.memfd_create("arena")
    os.ftruncate(descriptor, size)
    os.pwrite(descriptor, content, 0)
    return descriptor


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def test_what_was_stored_is_fetched(holder: MemoryHolder) -> None:
    holder.store(manifest(), memory(b"weights"))

    found = holder.fetch(manifest().id)

    assert found is not None
    assert found[0] == manifest()
    assert os.pread(found[1], 7, 0) == b"weights"


def test_arenas_are_told_apart_by_rank_kind_and_number(holder: MemoryHolder) -> None:
    holder.store(manifest(), memory())
    for other in (manifest(rank=1), manifest(kind="kv"), manifest(number=1)):
        assert holder.fetch(other.id) is None


def test_storing_again_closes_the_former_descriptor(holder: MemoryHolder) -> None:
    first = memory(b"first")
    holder.store(manifest(), first)
    holder.store(manifest(), memory(b"second"))

    assert not is_open(first)
    found = holder.fetch(manifest().id)
    assert found is not None
    assert os.pread(found[1], 6, 0) == b"second"


def test_memory_smaller_than_its_manifest_is_refused_and_closed(holder: MemoryHolder) -> None:
    descriptor = memory(size=4095)
    with pytest.raises(ArenaError, match="4095 bytes, its manifest says 4096"):
        holder.store(manifest(), descriptor)
    assert not is_open(descriptor)
    assert holder.manifests == []


def test_an_unknown_kind_is_refused_and_closed(holder: MemoryHolder) -> None:
    descriptor = memory()
    with pytest.raises(ArenaError, match="scratch"):
        holder.store(manifest(kind="scratch"), descriptor)
    assert not is_open(descriptor)


def test_an_update_replaces_the_manifest(holder: MemoryHolder) -> None:
    holder.store(manifest(), memory())
    newer = manifest()
    newer.state = worker_pb2.ARENA_STATE_COMPLETE
    holder.update(newer)
    assert holder.manifests == [newer]


def test_an_update_of_nothing_or_of_the_size_is_refused(holder: MemoryHolder) -> None:
    with pytest.raises(ArenaError, match="is not held here"):
        holder.update(manifest())
    holder.store(manifest(), memory())
    with pytest.raises(ArenaError, match="has 4096 bytes; its new manifest says 8192"):
        holder.update(manifest(size=8192))


def test_releasing_closes_and_tells_the_size(holder: MemoryHolder) -> None:
    descriptor = memory()
    holder.store(manifest(), descriptor)

    assert holder.release(manifest().id) == 4096
    assert not is_open(descriptor)
    assert holder.release(manifest().id) == 0


def test_a_moved_arena_takes_the_place_of_the_one_that_had_its_number(holder: MemoryHolder) -> None:
    """E46: the second set of weights, once it was decided on."""
    first, second = memory(b"first"), memory(b"second", size=8192)
    holder.store(manifest(), first)
    holder.store(manifest(number=1, size=8192), second)

    holder.move(manifest(number=1).id, 0)

    assert not is_open(first)
    assert holder.manifests == [manifest(size=8192)]
    found = holder.fetch(manifest().id)
    assert found is not None
    assert os.pread(found[1], 6, 0) == b"second"


def test_an_arena_that_is_not_there_is_not_moved(holder: MemoryHolder) -> None:
    """What has the number stays."""
    holder.store(manifest(), memory())
    with pytest.raises(ArenaError, match="weights arena 1 of rank 0 is not held here"):
        holder.move(manifest(number=1).id, 0)
    assert holder.manifests == [manifest()]


def test_manifests_come_in_order(holder: MemoryHolder) -> None:
    for rank, kind in ((1, "weights"), (0, "weights"), (0, "comm")):
        holder.store(manifest(rank, kind), memory())
    assert [(held.id.rank, held.id.kind) for held in holder.manifests] == [
        (0, "comm"),
        (0, "weights"),
        (1, "weights"),
    ]


def test_closing_releases_everything() -> None:
    holder = MemoryHolder()
    descriptor = memory()
    holder.store(manifest(), descriptor)
    holder.close()
    holder.close()
    assert not is_open(descriptor)
