"""Worlds of real rank processes: built through a real store, over arenas that the holder's process keeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.rank_link import RankLink
from support.rank_processes import RankProcesses
from tpmodel_worker.arenas.identity import RENDEZVOUS_RANK, ArenaId
from tpmodel_worker.comm.rendezvous import start_store
from tpmodel_worker.settings import ServeSettings

EPOCH = 1 << 32 | 1
COUNTS = [1, 1023, 40_003, 600_001]


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
    """What every rank of a world is told, but for its size."""
    store = start_store("127.0.0.1")
    yield {"socket": str(holder.path), "rendezvous": f"127.0.0.1:{store.port}", "epoch": EPOCH}
    del store


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", "int64"])
def test_shared_memory_sums_in_rank_order(processes: RankProcesses, world: dict[str, Any], dtype: str) -> None:
    assert processes.run("reduce_all", 2, dtype=dtype, counts=COUNTS, **world) == ["shared_memory"] * 2


def test_four_ranks_on_fewer_processors(processes: RankProcesses, world: dict[str, Any]) -> None:
    assert processes.run("reduce_all", 4, dtype="float32", counts=COUNTS, **world) == ["shared_memory"] * 4


def test_eight_ranks_on_fewer_processors(processes: RankProcesses, world: dict[str, Any]) -> None:
    """Without giving the processor away, 200 collectives would take minutes."""
    started = time.monotonic()
    processes.run("reduce_all", 8, dtype="bfloat16", counts=[2048] * 200, **world)
    assert time.monotonic() - started < 30


def test_gathers_and_broadcasts_of_any_dtype(processes: RankProcesses, world: dict[str, Any]) -> None:
    assert processes.run("gather_and_broadcast", 3, **world) == ["shared_memory"] * 3


class TestGloo:
    def test_ranks_of_different_pods_talk_through_gloo(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        assert processes.run("gather_and_broadcast", 2, pods=["a", "b"], **world) == ["gloo"] * 2

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
    def test_two_ranks_agree_bit_for_bit_with_shared_memory(
        self, processes: RankProcesses, world: dict[str, Any], dtype: str
    ) -> None:
        """Both equal the sum in the order of the ranks, so they equal each other."""
        for epoch, kind in ((EPOCH, "shared_memory"), (EPOCH + 1, "gloo")):
            arguments = world | {"epoch": epoch, "kind": kind}
            assert processes.run("reduce_all", 2, dtype=dtype, counts=COUNTS, **arguments) == [kind] * 2

    def test_four_ranks_agree_closely_and_among_each_other_exactly(
        self, processes: RankProcesses, world: dict[str, Any]
    ) -> None:
        world |= {"kind": "gloo"}
        processes.run("reduce_all", 4, dtype="float32", counts=COUNTS, exact=False, **world)
        sums = processes.run("reduce_to_list", 4, dtype="float32", count=1001, **(world | {"epoch": EPOCH + 1}))
        assert all(other == sums[0] for other in sums)

    def test_killed_rank_is_an_error_for_the_others(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """W20."""
        run = processes.start("reduce_until_failure", [0, 1], world_size=2, kind="gloo", deadline_seconds=5.0, **world)
        processes.pid(run, 1)
        time.sleep(0.7)
        processes.kill(run, 1)
        (ended,) = processes.values(run, [0])
        assert ended["error"] == "CommunicatorError"
        assert ended["rounds"] > 0

    def test_abort_releases_a_waiting_rank(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """P17."""
        run = processes.start(
            "wait_and_be_aborted", [0, 1], world_size=2, kind="gloo", abort_after=0.4, comes=[0], **world
        )
        assert processes.values(run, [0])[0] < 1.0


class TestMembership:
    def test_world_is_built_only_when_every_member_is_present(
        self, processes: RankProcesses, world: dict[str, Any]
    ) -> None:
        """W18."""
        arguments = {"world_size": 3, "dtype": "float32", "counts": [5], **world}
        first = processes.start("reduce_all", [0, 2], **arguments)
        time.sleep(0.5)
        assert not processes.finished(first, 0)
        last = processes.start("reduce_all", [1], **arguments)
        assert processes.values(first, [0, 2]) == ["shared_memory"] * 2
        assert processes.values(last, [1]) == ["shared_memory"]

    def test_missing_member_is_named_at_the_deadline(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """W19."""
        run = processes.start(
            "reduce_all", [0, 2], world_size=3, dtype="float32", counts=[5], timeout_seconds=0.5, **world
        )
        for rank in (0, 2):
            result = processes.result(run, rank)
            assert result["error"] == "CommunicatorError"
            assert result["message"].startswith(f"rank {rank}: the world was not built within 0.5 s: rank 1")

    def test_failure_of_one_member_ends_the_build_of_all_at_once(
        self, processes: RankProcesses, world: dict[str, Any]
    ) -> None:
        """W21: rank 1 has no supervisor's socket to keep its arena, and says so."""
        arguments = {"world_size": 2, "dtype": "float32", "counts": [5], "timeout_seconds": 30.0}
        started = time.monotonic()
        good = processes.start("reduce_all", [0], **arguments, **world)
        bad = processes.start("reduce_all", [1], **arguments, **(world | {"break_link": True}))
        assert "ArenaLinkError" in processes.result(good, 0)["message"]
        assert "rank 1 could not join" in processes.result(good, 0)["message"]
        assert processes.result(bad, 1)["error"] == "CommunicatorError"
        assert time.monotonic() - started < 10

    def test_failed_build_succeeds_at_the_next_epoch(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """W19: also when the first build failed."""
        arguments = {"world_size": 2, "dtype": "float32", "counts": [5]}
        run = processes.start("reduce_all", [0], timeout_seconds=0.3, **arguments, **world)
        assert "error" in processes.result(run, 0)
        processes.run("reduce_all", **arguments, **(world | {"epoch": EPOCH + 1}))

    def test_build_can_be_cancelled(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """An abort reaches a rank that waits for its peers."""
        run = processes.start("cancel_build", [0], world_size=2, cancel_after=0.4, **world)
        assert processes.values(run, [0])[0] < 1.0

    def test_no_rendezvous_is_named(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        arguments = world | {"rendezvous": "127.0.0.1:1", "timeout_seconds": 0.3}
        run = processes.start("reduce_all", [0], world_size=2, dtype="float32", counts=[5], **arguments)
        assert "rank 0: no rendezvous at 127.0.0.1:1" in processes.result(run, 0)["message"]


class TestFaults:
    def test_killed_rank_is_an_error_then_the_next_epoch_is_right(
        self, processes: RankProcesses, holder: RankLink, world: dict[str, Any]
    ) -> None:
        """W20: SIGKILL in the middle of collectives; the survivor's process goes on with a new peer."""
        run = processes.start(
            "survive", [0], world_size=2, next_epoch=EPOCH + 1, counts=COUNTS, deadline_seconds=1.0, **world
        )
        first = processes.start("reduce_until_failure", [1], world_size=2, **world)
        processes.pid(first, 1)
        while ArenaId(1, "comm") not in holder.arenas:
            time.sleep(0.01)
        time.sleep(0.5)
        processes.kill(first, 1)
        assert processes.result(first, 1) == {"signal": 9}
        second = processes.start(
            "reduce_all", [1], world_size=2, dtype="float32", counts=COUNTS, **(world | {"epoch": EPOCH + 1})
        )
        (ended,) = processes.values(run, [0])
        assert ended["error"] == "CommunicatorError"
        assert "rank 1 did not come within 1.0 s" in ended["message"]
        assert ended["rounds"] > 0
        assert processes.values(second, [1]) == ["shared_memory"]

    def test_abort_releases_a_waiting_rank(self, processes: RankProcesses, world: dict[str, Any]) -> None:
        """P17."""
        run = processes.start("wait_and_be_aborted", [0, 1, 2], world_size=3, abort_after=0.4, comes=[0, 1], **world)
        assert max(processes.values(run, [0, 1])) < 1.0

    def test_memory_survives_the_rank_that_made_it(
        self, processes: RankProcesses, holder: RankLink, world: dict[str, Any]
    ) -> None:
        run = processes.start("fill_arena_and_hang", [0], socket=world["socket"], size=1 << 20)
        while ArenaId(0, "weights") not in holder.arenas:
            time.sleep(0.01)
        processes.kill(run, 0)
        assert processes.result(run, 0) == {"signal": 9}
        assert processes.values(processes.start("sum_arena", [1], socket=world["socket"]), [1]) == [
            sum(range(256)) * 4096
        ]


def test_rendezvous_process_says_its_port_serves_and_ends_with_the_supervisor(
    processes: RankProcesses, holder: RankLink, tmp_path: Path
) -> None:
    settings = ServeSettings(model_path="", model_id="", served_name="", runtime_dir=str(tmp_path))
    run = processes.start("serve_store", [0], settings_json=settings.to_json())
    while not holder.hellos():
        time.sleep(0.01)
    (hello,) = holder.hellos()
    assert (hello.rank, hello.pid) == (RENDEZVOUS_RANK, processes.pid(run, 0))
    world = {"socket": str(holder.path), "rendezvous": f"127.0.0.1:{hello.port}", "epoch": EPOCH}
    processes.run("reduce_all", 2, dtype="float32", counts=[100], **world)
    holder.disconnect()
    assert processes.values(run, [0]) == ["ended"]
