"""Whole servers whose trainer dies or hangs in the middle of an update."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.trainer import TOKEN
from support.updated_server import Served, serve
from support.waiting import until
from tpmodel.trainer import WeightUpdateError

TESTS = Path(__file__).parents[1]
NEVER = 600.0
"""A deadline that no test waits for."""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serve(tmp_path_factory.mktemp("server"), 2) as server:
        yield server


def strike(served: Served, *, blow: signal.Signals, mode: str, where: str, deadline: float) -> subprocess.Popen[str]:
    """A trainer that has sent half a set and is then sent a signal."""
    arguments = [str(served.checkpoint), served.server.control_target, TOKEN, mode, str(deadline), where]
    process = subprocess.Popen(
        [sys.executable, "-m", "support.killed_trainer", *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(TESTS)},
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(blow)
    return process


def may_be_updated(served: Served) -> bool:
    """Whether the update before is over: another trainer is let in, and its set committed."""
    try:
        served.heal()
    except WeightUpdateError as error:
        if error.code != "FAILED_PRECONDITION":
            raise
        served.version -= 1
        return False
    return True


@pytest.mark.parametrize("where", ["between", "within"])
@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_a_killed_trainer_is_noticed_at_once(served: Served, mode: str, where: str) -> None:
    """E46: long before the deadline; in place nothing is served then, in shadow the old version."""
    process = strike(served, blow=signal.SIGKILL, mode=mode, where=where, deadline=NEVER)
    process.communicate()
    if mode == "in_place":
        until(lambda: bool(served.state().weights_condition == "WeightsIncomplete"), "it is noticed")
        assert not served.served().HasField("version")
    else:
        served.check()
    until(lambda: may_be_updated(served), "another trainer is let in")
    served.check()


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_a_stopped_trainer_is_waited_for_up_to_the_deadline(served: Served, mode: str) -> None:
    """E46: its connections stay, so that only time tells."""
    process = strike(served, blow=signal.SIGSTOP, mode=mode, where="within", deadline=3.0)
    try:
        if mode == "in_place":
            until(lambda: served.state().weights_condition == "WeightsIncomplete", "the deadline passes")
        else:
            served.check()
        until(lambda: may_be_updated(served), "another trainer is let in")
        served.check()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("mode", ["in_place", "shadow"])
def test_an_engine_that_dies_before_the_commit_leaves_no_half_set(served: Served, mode: str) -> None:
    """E46, U35: all tensors have come; the next engine finds the old version, or that there is none."""
    weights = {name: tensor + 1 for name, tensor in served.trained.weights.items()}

    def update() -> None:
        with served.connect(mode=mode) as trainer, trainer.update(served.version + 1) as update:
            update.send(weights)
            before = served.state().instance_id
            (engine,) = [process.pid for process in served.processes() if process.name == "engine"]
            os.kill(engine, signal.SIGKILL)
            until(lambda: served.is_serving_anew(before), "another engine has its world", 60)

    with pytest.raises(WeightUpdateError):
        update()
    if mode == "in_place":
        assert served.state().weights_condition == "WeightsIncomplete"
    else:
        served.check()
    served.heal()
    served.check()
