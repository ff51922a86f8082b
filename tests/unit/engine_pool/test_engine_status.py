"""The engine's account of itself: told at once, counters bundled."""

from __future__ import annotations

import asyncio

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.status import COUNTER_SECONDS, MAX_FAULTS, EngineStatus


class Listener:
    """Copies of every state told."""

    def __init__(self) -> None:
        self.states: list[worker_pb2.EngineState] = []

    def __call__(self, state: worker_pb2.EngineState) -> None:
        copy = worker_pb2.EngineState()
        copy.CopyFrom(state)
        self.states.append(copy)


@pytest.fixture
def status() -> EngineStatus:
    return EngineStatus("engine-1", 2, "model", 128)


def test_listener_hears_the_present_state_first(status: EngineStatus) -> None:
    listener = Listener()
    status.listen(listener)
    (state,) = listener.states
    assert (state.instance_id, state.phase, state.world_size) == ("engine-1", worker_pb2.PHASE_FORMING, 2)
    assert [rank.state for rank in state.ranks] == ["missing", "missing"]


def test_phase_is_told_at_once(status: EngineStatus) -> None:
    listener = Listener()
    stop = status.listen(listener)
    status.set_phase(worker_pb2.PHASE_FAILED, exit_code=64, cause="bad config")
    last = listener.states[-1]
    assert (last.phase, last.exit_code, last.cause) == (worker_pb2.PHASE_FAILED, 64, "bad config")
    stop()
    status.set_phase(worker_pb2.PHASE_FORMING)
    assert len(listener.states) == 2


async def test_counters_are_bundled(status: EngineStatus) -> None:
    listener = Listener()
    status.listen(listener)
    for running in range(1, 6):
        status.set_counters(running=running, waiting=0, kv_blocks_used=running)
    assert len(listener.states) == 1
    await asyncio.sleep(2 * COUNTER_SECONDS)
    assert [state.running for state in listener.states] == [0, 5]
    status.set_counters(running=5, waiting=0, kv_blocks_used=5)
    await asyncio.sleep(2 * COUNTER_SECONDS)
    assert len(listener.states) == 2


def test_ready_ranks_are_those_that_were_built_and_are_still_there(status: EngineStatus) -> None:
    members = [worker_pb2.RankState(rank=rank, pid=10 + rank, state="connected") for rank in range(2)]
    status.set_members(members)
    status.set_rank_states("ready", ["nccl", "nccl"])
    assert status.state.ready_ranks == 2
    status.set_members([members[0], worker_pb2.RankState(rank=1, pid=99, state="connected")])
    assert [rank.state for rank in status.state.ranks] == ["ready", "connected"]
    status.set_members([members[0]])
    assert status.state.ready_ranks == 1
    assert status.state.ranks[1].state == "missing"


def test_last_faults_are_kept(status: EngineStatus) -> None:
    for number in range(MAX_FAULTS + 3):
        status.add_fault("session_closed", f"fault {number}")
    kept = [fault.message for fault in status.state.last_faults]
    assert kept == [f"fault {number}" for number in range(3, MAX_FAULTS + 3)]


@pytest.mark.parametrize(
    ("known", "loaded", "version", "condition"),
    [
        (0, [0, 0], 0, ""),
        (0, [3, 3], 3, ""),
        (3, [3, 3], 3, ""),
        # The engine missed the news of the commit.
        (3, [4, 4], 4, ""),
        (3, [3, None], 3, "WeightsIncomplete"),
        (0, [None, None], 0, "WeightsIncomplete"),
        (3, [3, 0], 3, "WeightsLost"),
        (3, [0, 0], 3, "WeightsLost"),
        (0, [0, 2], 0, "WeightsLost"),
    ],
)
def test_a_new_world_serves_one_version_that_is_not_older_than_the_last(
    status: EngineStatus, known: int, loaded: list[int | None], version: int, condition: str
) -> None:
    """E46: never the checkpoint in silence."""
    status.set_weight_version(known)
    status.set_loaded_versions(loaded)
    assert (status.state.weight_version, status.state.weights_condition) == (version, condition)
    assert bool(status.state.weights_message) == bool(condition)


@pytest.mark.parametrize(
    ("committed", "loaded", "condition"),
    [(0, [0, 0], ""), (3, [3, 3], ""), (3, [4, 4], ""), (3, [0, 0], "WeightsLost"), (3, [2, 2], "WeightsLost")],
)
def test_a_gang_without_memory_is_held_to_the_version_that_it_is_known_to_have_had(
    status: EngineStatus, committed: int, loaded: list[int | None], condition: str
) -> None:
    """E46: never the checkpoint in silence; what comes next is above all that was."""
    status.set_loaded_versions(loaded, committed)
    assert status.state.weights_condition == condition
    assert status.newest_version == max(committed, loaded[0] or 0)
    if condition:
        assert f"version {committed} is lost, the ranks have {loaded[0]}" in status.state.weights_message
