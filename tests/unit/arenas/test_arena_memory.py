"""Arenas on CPU: sealed memory, checked mappings, typed views."""

from __future__ import annotations

import gc
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tpmodel.v1 import worker_pb2
from tpmodel_worker.arenas.errors import ArenaMemoryError, ArenaSizeError
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.arenas.memory import Arena

CPU = torch.device("cpu")
WEIGHTS = ArenaId(3, "weights")


@given(size=st.integers(0, 100_000))
def test_sizes_are_rounded_up_to_pages_and_memory_is_zero(size: int) -> None:
    arena = Arena.create(WEIGHTS, size, CPU)
    assert max(size, 1) <= arena.size < size + mmap.PAGESIZE + 1
    assert arena.size % mmap.PAGESIZE == 0
    assert not arena.bytes.any()
    arena.close()


def test_second_mapping_sees_the_same_memory() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    other = Arena.map(WEIGHTS, os.dup(arena.descriptor), arena.size, CPU)
    arena.bytes[17] = 42
    assert other.bytes[17] == 42
    assert other.bytes.data_ptr() != arena.bytes.data_ptr()
    arena.close()
    other.close()


def test_view_is_typed_shaped_and_aliases_the_memory() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    view = arena.view(256, (3, 5), torch.bfloat16)
    assert (view.shape, view.dtype, view.is_contiguous()) == ((3, 5), torch.bfloat16, True)
    view.fill_(1.0)
    assert arena.bytes[256:286].view(torch.bfloat16).eq(1).all()
    assert not arena.bytes[286:].any()
    assert arena.view(0, (), torch.int64).shape == ()
    assert arena.view(4096, (0, 7), torch.float32).shape == (0, 7)
    arena.close()


@pytest.mark.parametrize(("offset", "message"), [(4090, "bytes 4090 to 4098 wanted, it has 4096"), (-8, "wanted")])
def test_view_past_the_end_is_refused(offset: int, message: str) -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    with pytest.raises(ValueError, match=message):
        arena.view(offset, (2,), torch.float32)
    arena.close()


def test_unaligned_view_is_refused() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    with pytest.raises(ValueError, match="offset 6 is not a multiple of 4"):
        arena.view(6, (2,), torch.float32)
    arena.close()


def test_memory_outlives_close_as_long_as_a_view_of_it() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    view = arena.view(0, (8,), torch.float32).fill_(5.0)
    arena.close()
    arena.close()
    gc.collect()
    assert view.eq(5).all()


def test_memory_is_given_back_with_its_last_view() -> None:
    """P15's basis."""
    arena = Arena.create(ArenaId(77, "kv", 5), 4096, CPU)
    name = "memfd:tpmodel kv arena 5 of rank 77"
    assert name in Path("/proc/self/maps").read_text()
    arena.close()
    gc.collect()
    assert name not in Path("/proc/self/maps").read_text()


def test_descriptor_smaller_than_its_manifest_is_refused_and_closed() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    copy = os.dup(arena.descriptor)
    with pytest.raises(ArenaSizeError, match="its manifest says 8192 bytes, its descriptor has 4096"):
        Arena.map(WEIGHTS, copy, 8192, CPU)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(copy)
    arena.close()


def test_memory_that_could_shrink_is_refused(tmp_path: Path) -> None:
    """A mapping of it could raise SIGBUS."""
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.truncate(unsealed, 4096)
    with pytest.raises(ArenaSizeError, match="not sealed against shrinking"):
        Arena.map(WEIGHTS, unsealed, 4096, CPU)
    (tmp_path / "file").write_bytes(bytes(4096))
    with pytest.raises(ArenaSizeError, match="not one of sealed memory"):
        Arena.map(WEIGHTS, os.open(tmp_path / "file", os.O_RDWR), 4096, CPU)


def test_arena_can_neither_shrink_nor_grow() -> None:
    arena = Arena.create(WEIGHTS, 4096, CPU)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.truncate(arena.descriptor, size)
    arena.close()


def test_too_little_memory_names_needed_and_free_bytes() -> None:
    with pytest.raises(ArenaMemoryError, match=rf"kv arena 0 of rank 1 needs {1 << 50} bytes, \d+ are free") as raised:
        Arena.create(ArenaId(1, "kv"), 1 << 50, CPU)
    assert raised.value.needed_bytes == 1 << 50
    assert 0 < raised.value.free_bytes < 1 << 50


def test_device_without_arenas_is_refused() -> None:
    with pytest.raises(ValueError, match="no arenas on meta"):
        Arena.create(WEIGHTS, 4096, torch.device("meta"))


def test_id_survives_the_wire_and_unknown_kinds_are_refused() -> None:
    assert ArenaId.from_proto(ArenaId(4, "comm", 1).to_proto()) == ArenaId(4, "comm", 1)
    with pytest.raises(ValueError, match="unknown arena kind 'disk'"):
        ArenaId.from_proto(worker_pb2.ArenaId(rank=1, kind="disk"))
