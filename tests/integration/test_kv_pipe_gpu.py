"""The KV pipe between two GPUs, over NCCL."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.rank_processes import RankProcesses

pytestmark = pytest.mark.gpu
BOTH = [0, 1]


@pytest.fixture(scope="module")
def processes() -> Iterator[RankProcesses]:
    with RankProcesses("kv_scenarios") as processes:
        yield processes


@pytest.fixture
def pipe(tmp_path: Path) -> dict[str, Any]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return {"port": port, "folder": str(tmp_path), "device": "cuda"}


def test_tensors_of_every_dtype_and_none_arrive_as_they_were(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K47, K49, K50, K54."""
    counts = processes.run("exchange", 2, **pipe)
    assert counts[0] == counts[1] > 70


def test_work_launched_after_send_does_not_change_what_arrives(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K56."""
    started = processes.start("overwrite_source", BOTH, **pipe)
    assert processes.values(started, BOTH) == [True, True]


def test_memory_of_the_pipe_is_used_again_behind_the_work_on_it(processes: RankProcesses, pipe: dict[str, Any]) -> None:
    """K51, K56: ordered by events alone."""
    started = processes.start("lent_memory", BOTH, **pipe)
    sent, (received, right) = processes.values(started, BOTH)
    assert right
    assert 1 < sent <= 5
    assert 1 <= received <= 5
