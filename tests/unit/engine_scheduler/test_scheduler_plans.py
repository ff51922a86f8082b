"""What goes into a plan: decodes, chunks, admissions, steps, releases."""

from __future__ import annotations

from support.scheduler_driver import SchedulerDriver, small_config, small_request
from tpmodel.v1 import worker_pb2


def start_decoding(driver: SchedulerDriver, *keys: int, prompt: int = 3, max_tokens: int = 30) -> None:
    """Brings requests to where each has its first token, with nothing outstanding."""
    for key in keys:
        driver.submit(small_request(key, prompt, max_tokens=max_tokens))
    driver.send_plan()
    driver.deliver_all()
    assert all(len(driver.outputs_of(key)) == 1 for key in keys)


def chunks(plan: worker_pb2.GenerateStepRequest) -> list[tuple[int, int]]:
    return [(chunk.slot, chunk.length) for chunk in plan.prefill_chunks]


def test_nothing_to_do_makes_no_plan():
    driver = SchedulerDriver(small_config())
    assert not driver.send_plan()
    assert not driver.scheduler.has_work


def test_a_new_request_is_admitted_with_its_tokens_blocks_and_sampling():
    driver = SchedulerDriver(small_config(block_size=4))
    driver.submit(small_request("key", [5, 6, 7, 8, 9], max_tokens=10, stops=[2]))
    driver.send_plan()
    [admission] = driver.last_plan.admissions
    assert list(admission.token_ids) == [5, 6, 7, 8, 9]
    assert (admission.slot, admission.prompt_length, admission.computed_length) == (0, 5, 0)
    assert (admission.sampling.max_tokens, list(admission.sampling.stop_token_ids)) == (10, [2])
    [delta] = driver.last_plan.block_table_deltas
    assert (delta.slot, delta.start, len(delta.blocks)) == (0, 0, 2)
    assert chunks(driver.last_plan) == [(0, 5)]
    assert driver.last_plan.steps == 1


def test_max_tokens_ends_at_the_context():
    driver = SchedulerDriver(small_config(max_model_len=20))
    driver.submit(small_request("limited", 15, max_tokens=10))
    driver.submit(small_request("unlimited", 15, max_tokens=0))
    driver.send_plan()
    assert [admission.sampling.max_tokens for admission in driver.last_plan.admissions] == [5, 5]


def test_a_long_prompt_goes_in_chunks_over_plans():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=8))
    driver.submit(small_request("long", 20))
    lengths = []
    for _ in range(3):
        driver.send_plan()
        lengths += chunks(driver.last_plan)
    assert lengths == [(0, 8), (0, 8), (0, 4)]
    driver.deliver_all()
    assert len(driver.outputs_of("long")) == 1


def test_decodes_come_before_prefill_in_the_token_budget():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=8))
    start_decoding(driver, 1, 2)
    driver.submit(small_request("new", 20))
    driver.send_plan()
    assert list(driver.last_plan.decode_slots) == [0, 1]
    assert chunks(driver.last_plan) == [(2, 6)]


def test_more_decodes_than_the_token_budget_run_in_order():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=2, prefix_cache=False))
    for key in range(3):
        driver.submit(small_request(key, 2, max_tokens=3))
    driver.finish()
    assert driver.counts.finished == 3


def test_a_higher_priority_goes_first_then_the_earlier_arrival():
    driver = SchedulerDriver(small_config(max_num_seqs=3))
    driver.submit(small_request("later", 2, priority=1))
    driver.submit(small_request("normal", 3))
    driver.submit(small_request("second normal", 4))
    driver.submit(small_request("urgent", 5, priority=-1))
    driver.send_plan()
    assert chunks(driver.last_plan) == [(0, 5), (1, 3), (2, 4)]


def test_an_urgent_arrival_takes_the_budget_from_a_running_prefill():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=8))
    driver.submit(small_request("long", 30))
    driver.send_plan()
    driver.submit(small_request("urgent", 5, priority=-1))
    driver.send_plan()
    assert chunks(driver.last_plan) == [(1, 5), (0, 3)]


def test_nobody_overtakes_a_request_that_waits_for_blocks():
    driver = SchedulerDriver(small_config(num_blocks=12, block_size=4))
    start_decoding(driver, 1)
    driver.submit(small_request("large", 44))
    driver.submit(small_request("small", 2))
    driver.send_plan()
    assert not driver.last_plan.admissions


def test_two_plans_run_ahead_of_the_replies():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 3))
    assert driver.send_plan()
    assert driver.send_plan()
    assert driver.outstanding_plans == 2
    assert list(driver.last_plan.decode_slots) == [0]
    driver.deliver_all()
    assert driver.outstanding_plans == 0
    assert len(driver.outputs_of("key")) == 2


def test_no_more_steps_are_planned_than_outputs_are_left():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 3, max_tokens=2))
    assert [driver.send_plan() for _ in range(3)] == [True, True, False]
    driver.deliver_all()
    assert driver.counts.finished == 1


def test_a_plan_has_several_steps_while_nothing_waits():
    driver = SchedulerDriver(small_config(), step_seconds=0.0001)
    start_decoding(driver, 1, 2)
    driver.send_plan()
    assert driver.last_plan.steps == 1  # nothing is known yet of how long a step takes
    driver.deliver_all()
    driver.send_plan()
    assert driver.last_plan.steps == 8


def test_steps_are_limited_by_their_expected_time():
    driver = SchedulerDriver(small_config(), step_seconds=0.002)
    start_decoding(driver, 1)
    driver.send_plan()
    driver.deliver_all()
    driver.send_plan()
    assert driver.last_plan.steps == 2


def test_steps_are_limited_by_the_longest_rest_and_shorter_ones_idle():
    driver = SchedulerDriver(small_config(), step_seconds=0.0001)
    driver.submit(small_request("short", 3, max_tokens=4))
    driver.submit(small_request("longer", 3, max_tokens=7))
    for _ in range(2):
        driver.send_plan()
        driver.deliver_all()
    driver.send_plan()
    assert driver.last_plan.steps == 5
    driver.deliver_all()
    assert (len(driver.outputs_of("short")), len(driver.outputs_of("longer"))) == (4, 7)


def test_a_waiting_request_keeps_plans_at_one_step():
    driver = SchedulerDriver(small_config(max_num_seqs=1), step_seconds=0.0001)
    start_decoding(driver, 1)
    driver.send_plan()
    driver.deliver_all()
    driver.submit(small_request("waiting", 3))
    driver.send_plan()
    assert driver.last_plan.steps == 1


def test_steps_shrink_before_a_sequence_is_preempted():
    driver = SchedulerDriver(small_config(num_blocks=5, block_size=4), step_seconds=0.0001)
    start_decoding(driver, 1, 2)
    driver.send_plan()
    driver.deliver_all()
    driver.send_plan()
    assert driver.last_plan.steps == 4
    assert list(driver.last_plan.decode_slots) == [0, 1]


def test_a_slot_is_released_and_filled_by_the_same_plan():
    driver = SchedulerDriver(small_config(max_num_seqs=1))
    driver.submit(small_request("first", 3, max_tokens=1))
    driver.submit(small_request("second", 3))
    driver.send_plan()
    driver.deliver_all()
    driver.send_plan()
    assert list(driver.last_plan.releases) == [0]
    assert [admission.slot for admission in driver.last_plan.admissions] == [0]


def test_a_release_is_sent_though_nothing_else_is_to_do():
    """P14."""
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("only", 3, max_tokens=1))
    driver.send_plan()
    driver.deliver_all()
    assert driver.scheduler.has_work
    driver.send_plan()
    assert (driver.last_plan.steps, driver.last_plan.ack_now, list(driver.last_plan.releases)) == (0, True, [0])
    driver.deliver_all()
    assert (driver.outstanding_plans, driver.scheduler.has_work) == (0, False)


def test_cancelling_frees_slot_and_blocks_with_the_first_plan_sent_after_it():
    """P14: with two plans outstanding, the third gives everything to the next request."""
    driver = SchedulerDriver(small_config(num_blocks=10, block_size=4, max_num_seqs=1))
    driver.submit(small_request("cancelled", 36))
    driver.send_plan()
    driver.send_plan()
    driver.submit(small_request("next", 36))
    driver.cancel("cancelled")
    driver.send_plan()
    assert list(driver.last_plan.releases) == [0]
    [admission] = driver.last_plan.admissions
    assert admission.slot == 0
    assert len(driver.last_plan.block_table_deltas[0].blocks) == 9
    driver.finish()
    assert driver.counts.overrun_tokens == 1


def test_cancelling_a_waiting_request_takes_it_from_the_queue():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("waiting", 3))
    driver.cancel("waiting")
    assert not driver.send_plan()
    assert driver.scheduler.waiting == 0


def test_cancelling_what_is_not_live_says_so():
    driver = SchedulerDriver(small_config())
    assert not driver.scheduler.cancel("unknown")
    driver.submit(small_request("known", 3))
    assert not driver.scheduler.cancel("known", 1)


def test_tokens_after_a_stop_are_neither_returned_nor_hashed():
    driver = SchedulerDriver(small_config(block_size=1), step_seconds=0.0)
    driver.submit(small_request("key", 4, max_tokens=0, stops=range(9)))  # every token stops
    driver.send_plan()
    driver.send_plan()
    driver.deliver_all()
    driver.finish()
    assert len(driver.outputs_of("key")) == 1
    assert driver.counts.overrun_tokens == 0  # the slot idled
