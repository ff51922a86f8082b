"""Requests of several samples: one prompt, shared."""

from __future__ import annotations

import pytest

from support.scheduler_driver import SchedulerDriver, small_config, small_request


def test_siblings_join_in_the_plan_after_the_prompt():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 6, n=3))
    driver.send_plan()
    assert len(driver.last_plan.admissions) == 1
    driver.send_plan()
    assert [admission.computed_length for admission in driver.last_plan.admissions] == [5, 5]
    assert [chunk.length for chunk in driver.last_plan.prefill_chunks] == [1, 1]


def test_siblings_wait_for_every_chunk_of_the_prompt():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=8))
    driver.submit(small_request("key", 20, n=2))
    admitted = []
    for _ in range(4):
        driver.send_plan()
        admitted.append(len(driver.last_plan.admissions))
    assert admitted == [1, 0, 0, 1]


def test_waiting_siblings_hold_no_other_request_up():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=16))
    driver.submit(small_request("several", 6, n=3))
    driver.submit(small_request("single", 6))
    driver.send_plan()
    assert len(driver.last_plan.admissions) == 2


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_full_blocks_are_shared_and_the_partial_one_is_copied(prefix_cache: bool):
    driver = SchedulerDriver(small_config(block_size=4, prefix_cache=prefix_cache))
    driver.submit(small_request("key", 10, n=2))
    driver.send_plan()
    first = list(driver.last_plan.block_table_deltas[0].blocks)
    driver.send_plan()
    second = list(driver.last_plan.block_table_deltas[0].blocks)
    assert second[:2] == first[:2]
    assert [(copy.source, copy.target) for copy in driver.last_plan.block_copies] == [(first[2], second[2])]
    driver.finish()


def test_samples_that_cannot_share_blocks_each_begin_at_their_first_token():
    """Models with recurrent state."""
    driver = SchedulerDriver(small_config(block_size=4, prefix_cache=False, share_blocks=False))
    driver.submit(small_request("key", 10, n=3))
    driver.send_plan()
    plan = driver.last_plan
    assert [admission.computed_length for admission in plan.admissions] == [0, 0, 0]
    blocks = [block for delta in plan.block_table_deltas for block in delta.blocks]
    assert len(set(blocks)) == len(blocks) == 9
    assert not plan.block_copies
    driver.finish()


def test_a_prefix_cache_of_blocks_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="prefix_cache needs share_blocks or state_snapshots"):
        small_config(prefix_cache=True, share_blocks=False)


def test_a_last_prompt_token_alone_in_its_block_needs_no_copy():
    driver = SchedulerDriver(small_config(block_size=4))
    driver.submit(small_request("key", 9, n=2))
    driver.send_plan()
    driver.send_plan()
    assert len(driver.last_plan.admissions) == 1
    assert not driver.last_plan.block_copies
    driver.finish()


def test_a_prompt_of_whole_blocks_copies_its_last_one():
    driver = SchedulerDriver(small_config(block_size=4))
    driver.submit(small_request("key", 8, n=2))
    driver.send_plan()
    driver.send_plan()
    assert len(driver.last_plan.block_copies) == 1
    driver.finish()


def test_samples_count_on_from_the_requests_index():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 6, n=2, sample_index=5))
    driver.send_plan()
    indices = [admission.sampling.sample_index for admission in driver.last_plan.admissions]
    driver.send_plan()
    indices += [admission.sampling.sample_index for admission in driver.last_plan.admissions]
    assert indices == [5, 6]
    driver.finish()
    assert driver.outputs_of("key", 5) != driver.outputs_of("key", 6)


def test_one_sample_can_be_cancelled():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 6, n=3))
    driver.send_plan()
    driver.cancel("key", 1)
    driver.send_plan()
    assert [admission.sampling.sample_index for admission in driver.last_plan.admissions] == [2]
    driver.finish()
    assert driver.counts.finished == 2


def test_when_the_first_sample_is_cancelled_another_computes_the_prompt():
    driver = SchedulerDriver(small_config(max_num_batched_tokens=8, prefix_cache=False))
    driver.submit(small_request("key", 20, n=2))
    driver.send_plan()
    driver.cancel("key", 0)
    driver.send_plan()
    [admission] = driver.last_plan.admissions
    assert (admission.sampling.sample_index, admission.computed_length) == (1, 0)
    driver.finish()


def test_fewer_slots_than_samples():
    driver = SchedulerDriver(small_config(max_num_seqs=2))
    driver.submit(small_request("key", 6, n=5))
    driver.finish()
    assert driver.counts.finished == 5


def test_samples_that_do_not_fit_together_run_one_after_another():
    driver = SchedulerDriver(small_config(num_blocks=4, block_size=4))
    driver.submit(small_request("key", 6, n=4, max_tokens=10))
    driver.finish()
    assert driver.counts.finished == 4


def test_the_request_is_admitted_once_for_all_its_samples():
    driver = SchedulerDriver(small_config())
    driver.submit(small_request("key", 6, n=3))
    assert (driver.scheduler.running, driver.scheduler.waiting) == (0, 1)
    driver.send_plan()
    driver.send_plan()
    assert (driver.scheduler.running, driver.scheduler.slots_used) == (1, 3)
    assert driver.expected["key"].admitted
