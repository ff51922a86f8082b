"""Arenas and NCCL worlds on real GPUs, one process for each."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.rank_link import RankLink
from support.rank_processes import RankProcesses
from tpmodel_worker.arenas.identity import ArenaId
from tpmodel_worker.comm.rendezvous import start_store

pytestmark = pytest.mark.gpu

EPOCH = 1 << 32 | 1
COUNTS = [1, 1023, 40_003, 600_001]
MEBIBYTE = 1 << 20
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    with RankProcesses() as processes:
        yield processes


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[RankLink]:
    with RankLink(tmp_path / "rank.sock") as holder:
        yield holder


@pytest.fixture
def world(holder: RankLink) -> Iterator[dict[str, Any]]:
    store = start_store("127.0.0.1")
    yield {"socket": str(holder.path), "rendezvous": f"127.0.0.1:{store.port}", "epoch": EPOCH, "device": "cuda"}
    del store


def test_device_memory_survives_the_rank_that_made_it(processes: RankProcesses, holder: RankLink) -> None:
    """The holder has no CUDA context of its own."""
    place = {"socket": str(holder.path), "device": "cuda"}
    run = processes.start("fill_arena_and_hang", [0], size=8 * MEBIBYTE, **place)
    while ArenaId(0, "weights") not in holder.arenas:
        assert not processes.finished(run, 0), processes.result(run, 0)
        time.sleep(0.01)
    processes.kill(run, 0)
    assert processes.result(run, 0) == {"signal": 9}
    reader = processes.start("sum_arena", [1], **place)
    assert processes.values(reader, [1]) == [sum(range(256)) * 8 * MEBIBYTE // 256]


def test_device_arena_views_checks_and_gives_back(processes: RankProcesses, holder: RankLink) -> None:
    assert processes.values(processes.start("use_device_arena", [0]), [0]) == ["done"]


@needs_two
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_are_right_and_equal_on_all_ranks(processes: RankProcesses, world: dict[str, Any], dtype: str) -> None:
    size = torch.cuda.device_count()
    names = processes.run("reduce_all", size, dtype=dtype, counts=COUNTS, exact=False, **world)
    assert names == ["nccl"] * size
    sums = processes.run("reduce_to_list", size, dtype=dtype, count=1001, **(world | {"epoch": EPOCH + 1}))
    assert all(other == sums[0] for other in sums)


@needs_two
def test_gathers_and_broadcasts_of_any_dtype(processes: RankProcesses, world: dict[str, Any]) -> None:
    assert processes.run("gather_and_broadcast", 2, **world) == ["nccl"] * 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_ranks_that_share_a_device_sum_through_gloo(
    processes: RankProcesses, world: dict[str, Any], dtype: str
) -> None:
    """The sum in the order of the two ranks, as on CPU."""
    assert processes.run("reduce_all", 2, dtype=dtype, counts=COUNTS, kind="gloo", **world) == ["gloo"] * 2


def test_four_ranks_that_share_a_device_have_equal_sums(processes: RankProcesses, world: dict[str, Any]) -> None:
    world |= {"kind": "gloo"}
    processes.run("reduce_all", 4, dtype="float32", counts=COUNTS, exact=False, **world)
    sums = processes.run("reduce_to_list", 4, dtype="bfloat16", count=1001, **(world | {"epoch": EPOCH + 1}))
    assert all(other == sums[0] for other in sums)


def test_ranks_that_share_a_device_gather_and_broadcast_any_dtype(
    processes: RankProcesses, world: dict[str, Any]
) -> None:
    assert processes.run("gather_and_broadcast", 2, kind="gloo", **world) == ["gloo"] * 2


@needs_two
def test_abort_releases_a_rank_whose_peer_was_killed_and_the_next_epoch_is_right(
    processes: RankProcesses, world: dict[str, Any], tmp_path: Path
) -> None:
    """W20, P17: the survivor's process, its context and its other memory go on."""
    arguments = {"world_size": 2, **world}
    started, fault = tmp_path / "started", tmp_path / "fault"
    run = processes.start(
        "survive_on_device", [0], next_epoch=EPOCH + 1, started=str(started), fault=str(fault), **arguments
    )
    first = processes.start("reduce_on_device_for_ever", [1], **arguments)
    while not started.exists():
        assert not processes.finished(run, 0), processes.result(run, 0)
        time.sleep(0.01)
    processes.kill(first, 1)
    assert processes.result(first, 1) == {"signal": 9}
    fault.touch()
    second = processes.start(
        "reduce_all", [1], dtype="float32", counts=[5], exact=False, **(arguments | {"epoch": EPOCH + 1})
    )
    (ended,) = processes.values(run, [0])
    assert ended["error"] == "CommunicatorAbortedError"
    assert ended["weights_intact"]
    assert ended["abort_seconds"] < 5
    assert processes.values(second, [1]) == ["nccl"]


@needs_two
def test_missing_member_is_an_error_at_the_deadline(processes: RankProcesses, world: dict[str, Any]) -> None:
    """W19."""
    run = processes.start("reduce_all", [0], world_size=2, dtype="float32", counts=[5], timeout_seconds=2.0, **world)
    assert "rank 1 did not come" in processes.result(run, 0)["message"]
