"""Pipes between the ranks of two gangs outlive a transfer, and no longer than they are of use; over Gloo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.rank_processes import RankProcesses

BOTH = [0, 1]


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    with RankProcesses("handover_scenarios") as processes:
        yield processes


def run(processes: RankProcesses, scenario: str, folder: Path, **arguments: Any) -> list[Any]:
    started = processes.start(scenario, BOTH, folder=str(folder), **arguments)
    return processes.values(started, BOTH)


@pytest.mark.parametrize(("senders", "receivers"), [(1, 1), (2, 2), (2, 4), (4, 2)])
def test_later_transfers_use_the_pipes_of_the_first(
    processes: RankProcesses, tmp_path: Path, senders: int, receivers: int
) -> None:
    """With what belongs to each of them; at the end of the world nothing is left open."""
    assert run(processes, "several", tmp_path, senders=senders, receivers=receivers) == [True, True]


def test_transfers_at_the_same_time_have_pipes_of_their_own_which_are_used_again(
    processes: RankProcesses, tmp_path: Path
) -> None:
    assert run(processes, "at_a_time", tmp_path) == [True, True]


def test_a_pipe_that_breaks_amid_a_transfer_fails_it_and_the_next_one_opens_another(
    processes: RankProcesses, tmp_path: Path
) -> None:
    (sent,), (received,) = run(processes, "after_a_fault", tmp_path)
    assert "not everything was sent" in sent or "the pipe can't send any more" in sent
    assert received == "the pipe from rank 0 is not open any more: send the request again"


def test_a_gang_whose_world_was_built_anew_gets_another_pipe(processes: RankProcesses, tmp_path: Path) -> None:
    """The old one is closed at both ends."""
    assert run(processes, "another_world", tmp_path) == [True, True]


def test_for_a_gang_that_does_not_name_its_world_no_pipe_is_kept(processes: RankProcesses, tmp_path: Path) -> None:
    assert run(processes, "a_caller_without_a_name", tmp_path) == [True, True]
