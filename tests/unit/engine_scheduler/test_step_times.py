"""How many steps are expected to fit."""

from __future__ import annotations

from tpmodel_worker.engine.step_times import StepTimes


def test_an_unknown_batch_size_gets_one_step():
    assert StepTimes().steps_within(4, 0.005, 8) == 1


def test_steps_fill_the_time_and_no_more():
    times = StepTimes()
    times.record(1, 0.001)
    assert times.steps_within(1, 0.005, 8) == 5
    assert times.steps_within(1, 0.1, 8) == 8


def test_a_step_longer_than_the_time_still_runs_alone():
    times = StepTimes()
    times.record(1, 1.0)
    assert times.steps_within(1, 0.005, 8) == 1


def test_batches_between_powers_of_two_share_a_mean():
    times = StepTimes()
    times.record(5, 0.001)
    assert times.steps_within(8, 0.005, 8) == 5
    assert times.steps_within(9, 0.005, 8) == 1
    assert times.steps_within(4, 0.005, 8) == 1


def test_the_mean_follows_what_steps_take_now():
    times = StepTimes()
    times.record(1, 1.0)
    for _ in range(40):
        times.record(1, 0.0005)
    assert times.steps_within(1, 0.005, 8) == 8
