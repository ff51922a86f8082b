"""What the end of a process, and a failed engine mean for the pod."""

from __future__ import annotations

import signal

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.exit_codes import ExitCode
from tpmodel_worker.supervisor.lifecycle import (
    Ending,
    RestartPolicy,
    judge_member,
    judge_refusal,
    judge_repeated,
    judge_state,
)
from tpmodel_worker.supervisor.processes import ProcessExit

KILLED = ProcessExit("rank 1", 4711, None, signal.SIGKILL)
CRASHED = ProcessExit("engine", 4712, 1, None)
LEFT = ProcessExit("engine", 4712, 0, None)


def test_an_exit_is_described_by_name_pid_and_reason() -> None:
    assert KILLED.describe() == "rank 1 (pid 4711) was killed by SIGKILL"
    assert CRASHED.describe() == "engine (pid 4712) ended with code 1"
    assert ProcessExit("api 0", 1, None, 40).describe() == "api 0 (pid 1) was killed by signal 40"


@pytest.mark.parametrize("phase", ["UNSPECIFIED", "FORMING", "LOADING"])
def test_a_member_that_dies_before_the_world_served_is_replaced(phase: str) -> None:
    """W19."""
    assert judge_member(KILLED, worker_pb2.Phase.Value(f"PHASE_{phase}")) is None


@pytest.mark.parametrize("phase", ["SERVING", "REBUILDING", "DRAINING", "DRAINED"])
def test_a_member_that_dies_in_a_serving_world_restarts_the_gang(phase: str) -> None:
    ending = judge_member(KILLED, worker_pb2.Phase.Value(f"PHASE_{phase}"))

    cause = f"rank 1 (pid 4711) was killed by SIGKILL while the world was {phase.lower()}"
    assert ending == Ending(ExitCode.RESTART_GANG, cause)


@pytest.mark.parametrize("phase", ["DRAINING", "DRAINED"])
def test_leaving_at_the_end_of_a_drain_is_no_fault(phase: str) -> None:
    assert judge_member(LEFT, worker_pb2.Phase.Value(f"PHASE_{phase}")) is None
    assert judge_member(LEFT, worker_pb2.PHASE_SERVING) is not None


@pytest.mark.parametrize("phase", ["FORMING", "SERVING"])
def test_a_member_that_blames_the_configuration_ends_the_pod(phase: str) -> None:
    ending = judge_member(ProcessExit("rank 0", 1, 64, None), worker_pb2.Phase.Value(f"PHASE_{phase}"))
    assert ending is not None
    assert ending.code is ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    "line",
    [
        "[api 0] error: tokenizer.json: no tokenizer",
        '{"level": "error", "process": "api 0", "message": "tokenizer.json: no tokenizer"}',
        "tokenizer.json: no tokenizer",
    ],
)
def test_what_a_process_said_last_is_why_its_configuration_cannot_work(line: str) -> None:
    ending = judge_refusal(ProcessExit("api 0", 1, 64, None, ("something before", line)))
    assert ending == Ending(ExitCode.CONFIGURATION, "api 0: tokenizer.json: no tokenizer")


def test_another_end_is_no_refusal() -> None:
    assert judge_refusal(ProcessExit("api 0", 1, 1, None, ("ValueError",))) is None


@pytest.mark.parametrize(
    ("reported", "code"), [(64, ExitCode.CONFIGURATION), (75, ExitCode.RESTART_GANG), (0, ExitCode.RESTART_GANG)]
)
def test_a_failed_engine_decides_code_and_cause(reported: int, code: ExitCode) -> None:
    state = worker_pb2.EngineState(phase=worker_pb2.PHASE_FAILED, exit_code=reported, cause="no such tensor")
    assert judge_state(state) == Ending(code, "no such tensor")


def test_an_engine_that_has_not_failed_ends_nothing() -> None:
    assert judge_state(worker_pb2.EngineState(phase=worker_pb2.PHASE_LOADING, cause="x", exit_code=64)) is None


def test_pauses_grow_to_their_limit() -> None:
    policy = RestartPolicy(limit=100, first_pause_seconds=1, longest_pause_seconds=5)
    assert [policy.pause(float(now)) for now in range(5)] == [1, 2, 4, 5, 5]


def test_the_fifth_end_within_the_window_is_one_too_many() -> None:
    policy = RestartPolicy(limit=5, window_seconds=60)
    for now in (0, 10, 20, 30):
        policy.pause(float(now))
        assert judge_repeated(KILLED, policy) is None
    policy.pause(59)
    assert judge_repeated(KILLED, policy) == Ending(
        ExitCode.RESTART_GANG,
        "rank 1 ended 5 times within 60 s; the last time: rank 1 (pid 4711) was killed by SIGKILL",
    )


def test_ends_outside_the_window_are_forgotten() -> None:
    policy = RestartPolicy(limit=2, window_seconds=60, first_pause_seconds=1)
    assert policy.pause(0) == 1
    assert policy.pause(60) == 1
    assert not policy.exhausted
