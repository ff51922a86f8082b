"""The KV pipe between real processes, over Gloo."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.rank_processes import RankProcesses

MEBIBYTE = 1 << 20
BOTH = [0, 1]


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    with RankProcesses("kv_scenarios") as processes:
        yield processes


@pytest.fixture
def pipe(tmp_path: Path) -> dict[str, Any]:
    """What both ends are told: a free port, and a folder in which they leave word for each other."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {"port": port, "folder": str(tmp_path)}


def run(processes: RankProcesses, scenario: str, **arguments: Any) -> list[Any]:
    return processes.values(processes.start(scenario, BOTH, **arguments), BOTH)


@pytest.mark.parametrize("world_size", [2, 3])
def test_tensors_of_every_dtype_and_none_arrive_as_they_were_and_in_order(
    processes: RankProcesses, pipe: dict[str, Any], world_size: int
) -> None:
    """K49, K50: both directions at once; three members are a ring."""
    counts = processes.run("exchange", world_size, **pipe)
    assert counts == [counts[0]] * world_size
    assert counts[0] > 70


def test_none_counts_no_bytes(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K49."""
    assert run(processes, "none_counts_nothing", **pipe) == [100, 2]


def test_both_ends_may_receive_first(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K54: with more than the connections can buffer."""
    assert run(processes, "receive_first", size=32 * MEBIBYTE, **pipe) == [True, True]


class TestBackpressure:
    def test_send_returns_at_once_up_to_the_limit_and_then_waits(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K50, K51: a queue of exactly the limit takes one more."""
        sender, receiver = run(processes, "backpressure", **pipe)
        assert sender["queued"] == [MEBIBYTE, 2 * MEBIBYTE]
        assert sender["seconds"] < 2
        assert sender["third_waits"]
        assert receiver["received"] == [0, 1, 2, 3, 4]

    def test_send_gives_up_at_its_deadline_and_nothing_was_queued(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K51."""
        sender, receiver = run(processes, "backpressure_deadline", **pipe)
        assert sender["error"] == "KvPipeTimeoutError"
        assert "16 bytes are queued, more than 0, for 0.4 s" in sender["message"]
        assert receiver["received"] == [8, 16]


def test_the_source_may_be_overwritten_once_send_has_returned(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K56."""
    assert run(processes, "overwrite_source", **pipe) == [True, True]


def test_memory_of_the_pipe_is_used_again_for_several_items_under_way(
    processes: RankProcesses, pipe: dict[str, Any]
) -> None:
    """K51, K56: no more of it than the limits let through, and each item arrives as it was written."""
    sent, (received, right) = run(processes, "lent_memory", **pipe)
    assert right
    # Three under way, one more that the sender writes or the receiver reads.
    assert 1 < sent <= 5
    assert 1 <= received <= 5


class TestClose:
    def test_close_sends_what_is_queued_and_leaves_nothing_open(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K57: twice is once, and nothing can be sent afterwards."""
        (after, *left), (received, end) = run(processes, "close_drains", **pipe)
        assert received == list(range(20))
        assert end == {"error": "KvPipeClosedError", "message": "the peer has closed the pipe"}
        assert [error["error"] for error in after] == ["KvPipeClosedError"] * 2
        assert left == [0, 0, 0]

    def test_the_port_can_be_used_again(self, processes: RankProcesses, pipe: dict[str, Any]) -> None:
        """K57."""
        for _ in range(3):
            run(processes, "connect_only", **pipe)


class TestFailures:
    def test_a_failed_send_gives_its_bytes_back_and_surfaces_at_the_next_send_and_at_close(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K52: here the receiver refuses the size that the header claims."""
        ((send, close, again), queued), (receives, ready) = run(processes, "refused", **pipe)
        assert send["error"] == close["error"] == "KvPipeError"
        assert "the peer refused item 0: a tensor of shape (1001,) and 1001 bytes: at most 1000" in send["message"]
        assert "not everything was sent" in close["message"]
        assert again == {}
        assert queued == ready == 0
        assert [error["error"] for error in receives] == ["KvHeaderError"] * 2

    def test_a_killed_peer_is_an_error_on_both_directions_at_once_and_all_bytes_come_back(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K52, K53."""
        started = processes.start("lose_peer", BOTH, size=32 * MEBIBYTE, **pipe)
        for name in ("ready", "kill"):
            _wait_for(Path(pipe["folder"]) / name)
        killed = time.monotonic()
        processes.kill(started, 1)
        ((received, sent, closed), *left) = processes.values(started, [0])[0]
        # The deadline is 20 s, receive's own 15 s.
        assert time.monotonic() - killed < 10
        assert received["error"] in ("KvPipeClosedError", "KvPipeError")
        assert sent["error"] == closed["error"] == "KvPipeError"
        assert left == [0, 0, 0]

    def test_receive_gives_up_at_its_deadline_and_loses_nothing(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K53."""
        _, (seen, seconds, received) = run(processes, "receive_deadline", **pipe)
        assert seen == {"error": "KvPipeTimeoutError", "message": "nothing came within 0.2 s"}
        assert 0.2 <= seconds < 5
        assert received == [1.0, 1.0, 1.0]


class TestMeeting:
    def test_making_the_pipe_waits_for_every_member(self, processes: RankProcesses, pipe: dict[str, Any]) -> None:
        """K48: the barrier at the start."""
        early = processes.start("connect_only", [0], **pipe)
        late = processes.start("connect_only", [1], delay=0.7, **pipe)
        processes.values(late, [1])
        assert processes.values(early, [0])[0] >= 0.6

    def test_a_missing_member_is_named_when_the_stores_time_is_over(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K48."""
        alone = processes.start("connect_only", [0], store_timeout_seconds=0.5, **pipe)
        result = processes.result(alone, 0)
        assert result["error"] == "KvPipeError"
        assert "rank 1 did not come" in result["message"]

    def test_the_store_is_at_base_plus_offset_and_everything_is_bound_to_one_address(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K48, K55."""
        where = {"address": "127.0.0.5", "master_address": "127.0.0.5", "port_offset": 3}
        with socket.create_server(("127.0.0.5", 0)) as server:
            port = server.getsockname()[1]
        seen = run(processes, "listening_addresses", **(pipe | {"port": port - 3}), **where)
        assert {address for listening in seen for address, _ in listening} == {"127.0.0.5"}
        assert ["127.0.0.5", port] in seen[0]

    def test_a_member_with_another_token_is_refused_by_both(
        self, processes: RankProcesses, pipe: dict[str, Any]
    ) -> None:
        """K55."""
        arguments = pipe | {"store_timeout_seconds": 5.0}
        first = processes.start("connect_only", [0], **arguments)
        second = processes.start("connect_only", [1], token="another", **arguments)
        results = [processes.result(first, 0), processes.result(second, 1)]
        assert [result["error"] for result in results] == ["KvPipeError"] * 2
        assert any("token" in result["message"] for result in results)


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
