"""A request's ways in and out: refusals, resumed streams, deadlines, failures, a rebuilt world."""

from __future__ import annotations

import dataclasses

import pytest

from support.scheduler_driver import SchedulerDriver, small_config, small_request
from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.engine.requests import (
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    RESOURCE_EXHAUSTED,
    InvalidRequestError,
    NeverFitsError,
    ProtocolError,
    QueueFullError,
    RequestTooLongError,
    SchedulerConfig,
)


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    driver = SchedulerDriver(small_config(max_model_len=20))
    with pytest.raises(RequestTooLongError, match=r"has 20 tokens.* context is 20 tokens") as caught:
        driver.scheduler.submit(small_request("key", 20))
    assert caught.value.code == INVALID_ARGUMENT
    assert not driver.scheduler.has_work
    driver.scheduler.submit(small_request("key", 19))


def test_a_prompt_that_no_cache_holds_is_refused_with_the_numbers():
    driver = SchedulerDriver(small_config(num_blocks=3, block_size=4))
    with pytest.raises(NeverFitsError, match="13 tokens need 4 blocks of 4 tokens, but the KV cache has 3"):
        driver.scheduler.submit(small_request("key", 13))


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequestError, match="no tokens"):
        SchedulerDriver(small_config()).scheduler.submit(small_request("key", []))


def test_a_live_key_is_refused_and_a_past_one_is_not():
    driver = SchedulerDriver(small_config())
    driver.scheduler.submit(small_request("key", 3))
    with pytest.raises(InvalidRequestError, match="live already"):
        driver.scheduler.submit(small_request("key", 3))
    driver.scheduler.cancel("key")
    driver.scheduler.submit(small_request("key", 3))


def test_the_queue_limit_counts_requests_that_never_ran():
    driver = SchedulerDriver(small_config(queue_limit=2, max_num_seqs=1))
    driver.submit(small_request("running", 3))
    driver.send_plan()
    driver.submit(small_request("first", 3, n=4))
    driver.submit(small_request("second", 3))
    with pytest.raises(QueueFullError, match="2 requests wait already, the limit is 2") as caught:
        driver.scheduler.submit(small_request("third", 3))
    assert caught.value.code == RESOURCE_EXHAUSTED
    driver.cancel("first")
    assert driver.submit(small_request("third", 3))


def test_resumed_outputs_count_as_outputs():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("whole", [1, 2, 3], max_tokens=10))
    driver.finish()
    outputs = driver.outputs_of("whole")
    driver.submit(small_request("resumed", [1, 2, 3], max_tokens=10, resume=outputs[:6]))
    driver.send_plan()
    [admission] = driver.last_plan.admissions
    assert (len(admission.token_ids), admission.prompt_length, admission.sampling.max_tokens) == (9, 3, 10)
    driver.finish()
    assert driver.outputs_of("resumed") == outputs


def test_a_resumed_stream_that_was_complete_ends_at_once():
    driver = SchedulerDriver(small_config())
    driver.scheduler.submit(small_request("length", 3, max_tokens=2, resume=[5, 6]))
    driver.scheduler.submit(small_request("stop", 3, max_tokens=9, resume=[5, 6], stops=[6]))
    outputs = driver.scheduler.take_outputs()
    assert [output.admitted is not None for output in outputs] == [True, False, True, False]
    assert [output.finish_reason for output in outputs] == [
        None,
        inference_pb2.FINISH_REASON_LENGTH,
        None,
        inference_pb2.FINISH_REASON_STOP,
    ]
    assert not driver.scheduler.has_work


def test_a_deadline_fails_what_runs_and_what_waits():
    driver = SchedulerDriver(small_config(max_num_seqs=1))
    driver.submit(small_request("running", 3, deadline=driver.now + 5))
    driver.submit(small_request("waiting", 3, deadline=driver.now + 5))
    driver.submit(small_request("patient", 3, deadline=driver.now + 50))
    driver.send_plan()
    driver.advance(4.9)
    assert driver.counts.failed == {}
    driver.advance(0.2)
    assert driver.counts.failed == {DEADLINE_EXCEEDED: 2}
    assert driver.scheduler.next_deadline == driver.now + 50 - 5.1
    driver.finish()
    assert driver.counts.finished == 1


def test_nothing_is_planned_for_a_request_past_its_deadline():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("late", 3, deadline=driver.now + 1))
    driver.now += 2
    assert not driver.send_plan()
    assert driver.counts.failed == {DEADLINE_EXCEEDED: 1}


def test_fail_all_ends_everything_once():
    driver = SchedulerDriver(small_config(max_num_seqs=1))
    driver.submit(small_request("running", 3, n=2))
    driver.submit(small_request("waiting", 3))
    driver.send_plan()
    driver.fail_all()
    assert sum(driver.counts.failed.values()) == 2
    driver.finish()


def test_log_probabilities_reach_who_asked_for_them():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("with", 3, logprobs=2))
    driver.submit(small_request("without", 3))
    driver.finish()  # the driver compares them
    assert driver.counts.finished == 2


def test_a_rebuilt_world_goes_on_from_what_was_committed():
    driver = SchedulerDriver(small_config(max_num_seqs=2), step_seconds=0.0001)
    for key in ("first", "second", "third"):
        driver.submit(small_request(key, 3, max_tokens=20))
    for _ in range(4):
        driver.send_plan()
        driver.deliver_all()
    driver.send_plan()  # these tokens are lost with the world
    driver.rebuild(50)
    assert (driver.outstanding_plans, driver.scheduler.blocks_used, driver.scheduler.waiting) == (0, 0, 3)
    driver.send_plan()
    known = [len(admission.token_ids) for admission in driver.last_plan.admissions]
    assert known == [3 + len(driver.outputs_of("first")), 3 + len(driver.outputs_of("second"))]
    assert not driver.last_plan.releases
    driver.finish()
    assert driver.counts.finished == 3


def test_a_rebuilt_world_has_an_empty_prefix_cache():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("first", list(range(20))))
    driver.finish()
    driver.rebuild(50)
    driver.submit(small_request("second", list(range(20))))
    driver.finish()
    assert driver.counts.cached_tokens == 0
    assert driver.scheduler.counts.prefix_queries == 40


def test_a_rebuilt_world_may_have_blocks_of_another_size():
    driver = SchedulerDriver(small_config(block_size=4))
    driver.submit(small_request("first", list(range(9))))
    driver.send_plan()
    driver.scheduler.rebuild(small_config(block_size=2))
    driver.scheduler.next_plan(1)
    driver.scheduler.submit(small_request("second", list(range(9))))
    plan = driver.scheduler.next_plan(2)
    assert plan is not None
    assert plan.admissions[0].computed_length == 8


def plan_one(driver: SchedulerDriver) -> None:
    driver.scheduler.submit(small_request("key", 3, max_tokens=1))
    driver.scheduler.next_plan(7)


@pytest.mark.parametrize(
    ("seq", "reply", "message"),
    [
        (8, {"slots": [0], "token_ids": [1], "finished": [2]}, "oldest outstanding plan is 7"),
        (7, {"step": 1, "slots": [0], "token_ids": [1], "finished": [2]}, "expected step 0"),
        (7, {"slots": [1], "token_ids": [1], "finished": [2]}, "slot 1 has nothing to sample"),
        (7, {}, "0 slots, 0 tokens and 0 finish flags, expected 1"),
        (7, {"slots": [0], "token_ids": [1], "finished": [0]}, "reached its 4 tokens and goes on"),
        (7, {"slots": [0], "token_ids": [1, 2], "finished": [2]}, "1 slots, 2 tokens"),
    ],
)
def test_a_reply_that_does_not_fit_the_plan_is_a_fault(seq: int, reply: dict[str, object], message: str):
    """P11."""
    driver = SchedulerDriver(small_config())
    plan_one(driver)
    with pytest.raises(ProtocolError, match=message):
        driver.scheduler.commit(seq, worker_pb2.GenerateStepOk(**reply))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "value"), [("num_blocks", 0), ("max_num_seqs", 0), ("max_model_len", 1), ("max_steps", 9)]
)
def test_a_configuration_that_cannot_be_is_refused_by_name(name: str, value: int):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(small_config(), **{name: value})


def test_blocks_are_counted_in_whole():
    config: SchedulerConfig = small_config(block_size=4)
    assert [config.blocks_for(tokens) for tokens in (1, 4, 5)] == [1, 1, 2]
