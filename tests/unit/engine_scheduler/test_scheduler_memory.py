"""KV blocks: the prefix cache, preemption, and what never fits."""

from __future__ import annotations

from support.scheduler_driver import SchedulerDriver, small_config, small_request
from tpmodel_worker.engine.requests import RESOURCE_EXHAUSTED


def run(driver: SchedulerDriver, key: str, prompt: list[int], *, max_tokens: int = 2) -> int:
    """Runs a request to its end; returns how many of its tokens the prefix cache had."""
    before = driver.counts.cached_tokens
    driver.submit(small_request(key, prompt, max_tokens=max_tokens))
    driver.finish()
    return driver.counts.cached_tokens - before


def test_a_prompt_is_found_again_in_whole_blocks():
    driver = SchedulerDriver(small_config(block_size=4))
    prompt = list(range(10))
    assert run(driver, "first", prompt) == 0
    assert run(driver, "again", prompt) == 8
    assert (driver.scheduler.counts.prefix_queries, driver.scheduler.counts.prefix_hits) == (20, 8)


def test_a_cached_prompt_is_not_computed_again():
    driver = SchedulerDriver(small_config(block_size=4))
    run(driver, "first", list(range(10)))
    computed = driver.rank.computed_tokens
    run(driver, "again", list(range(10)))
    assert driver.rank.computed_tokens - computed == 3  # two of the prompt, and the first output


def test_at_least_one_token_of_a_prompt_is_computed():
    driver = SchedulerDriver(small_config(block_size=4))
    run(driver, "first", list(range(8)))
    assert run(driver, "again", list(range(8))) == 4


def test_outputs_are_found_by_a_prompt_that_goes_on_from_them():
    driver = SchedulerDriver(small_config(block_size=4))
    run(driver, "first", [1, 2, 3], max_tokens=10)
    # The last output was never computed: of 13 tokens 12 are in the cache.
    assert run(driver, "next turn", [1, 2, 3, *driver.outputs_of("first"), 7]) == 12


def test_a_block_whose_last_token_was_not_computed_is_not_found():
    driver = SchedulerDriver(small_config(block_size=4))
    run(driver, "first", [1, 2, 3], max_tokens=5)
    assert run(driver, "next turn", [1, 2, 3, *driver.outputs_of("first"), 7]) == 4


def test_what_follows_a_found_prefix_is_found_too():
    driver = SchedulerDriver(small_config(block_size=4))
    run(driver, "first", list(range(8)))
    assert run(driver, "longer", list(range(20))) == 8
    assert run(driver, "again", list(range(20))) == 16


def test_a_running_request_shares_its_prompt_with_the_next_plan():
    driver = SchedulerDriver(small_config(block_size=4))
    driver.submit(small_request("first", list(range(9))))
    driver.send_plan()
    driver.submit(small_request("second", list(range(9))))
    driver.send_plan()
    assert driver.last_plan.admissions[0].computed_length == 8
    assert driver.scheduler.blocks_used == 4  # two shared, and one more each


def test_without_a_prefix_cache_nothing_is_found():
    driver = SchedulerDriver(small_config(prefix_cache=False))
    run(driver, "first", list(range(10)))
    assert run(driver, "again", list(range(10))) == 0
    assert driver.scheduler.counts.prefix_queries == 0


def test_cached_blocks_give_way_to_new_ones():
    driver = SchedulerDriver(small_config(num_blocks=5, block_size=4))
    run(driver, "first", list(range(10)))
    run(driver, "other", list(range(100, 118)))
    assert run(driver, "again", list(range(10))) == 0


def start_two(driver: SchedulerDriver, *, priorities: tuple[int, int] = (0, 0), max_tokens: int = 12) -> None:
    """Two requests, of which only one fits to its end: 4 + 11 tokens each, in 5 blocks of 4."""
    driver.submit(small_request("first", 4, max_tokens=max_tokens, priority=priorities[0]))
    driver.submit(small_request("second", 4, max_tokens=max_tokens, priority=priorities[1]))


def run_until_release(driver: SchedulerDriver) -> int:
    while True:
        driver.send_plan()
        if driver.last_plan.releases:
            [slot] = driver.last_plan.releases
            return slot
        driver.deliver_all()


def test_without_blocks_the_latest_sequence_is_preempted_and_recomputed():
    driver = SchedulerDriver(small_config(num_blocks=5, block_size=4))
    start_two(driver)
    assert run_until_release(driver) == 1
    assert driver.scheduler.waiting == 1
    driver.finish()
    assert driver.counts.readmissions > 0
    assert driver.counts.finished == 2


def test_without_blocks_the_lower_priority_is_preempted():
    driver = SchedulerDriver(small_config(num_blocks=5, block_size=4))
    start_two(driver, priorities=(1, 0))
    driver.send_plan()
    slot_of_first = next(a.slot for a in driver.last_plan.admissions if a.token_ids[0] == _first_token("first"))
    assert run_until_release(driver) == slot_of_first


def _first_token(key: str) -> int:
    return small_request(key, 1).prompt_token_ids[0]


def run_ahead_until_release(driver: SchedulerDriver) -> None:
    """Keeps two plans outstanding until one releases a slot."""
    while driver.send_plan() and not driver.last_plan.releases:
        if driver.outstanding_plans == 2:
            driver.deliver()


def test_tokens_on_their_way_to_a_preempted_sequence_are_kept():
    driver = SchedulerDriver(small_config(num_blocks=5, block_size=4, max_steps=1))
    start_two(driver)
    run_ahead_until_release(driver)
    assert driver.outstanding_plans == 2  # one with the sequence, one that releases it
    before = len(driver.outputs_of("second"))
    driver.deliver_all()
    assert len(driver.outputs_of("second")) == before + 1
    driver.finish()


def test_a_preempted_sequence_comes_back_only_when_its_tokens_are_known():
    driver = SchedulerDriver(small_config(num_blocks=8, block_size=4, prefix_cache=False))
    driver.submit(small_request("first", 8, max_tokens=12))
    driver.submit(small_request("second", 8, max_tokens=12))
    run_ahead_until_release(driver)
    driver.cancel("first")
    driver.send_plan()
    assert not driver.last_plan.admissions  # though there is room now
    driver.deliver_all()
    driver.send_plan()
    [admission] = driver.last_plan.admissions
    assert len(admission.token_ids) == 8 + len(driver.outputs_of("second"))
    assert admission.prompt_length == 8


def test_a_sequence_that_has_all_its_outputs_planned_gives_way_first():
    driver = SchedulerDriver(small_config(num_blocks=6, block_size=1))
    driver.submit(small_request("planned to its end", 2, max_tokens=2))
    driver.submit(small_request("growing", 2, max_tokens=5))
    for _ in range(3):
        driver.send_plan()
    assert list(driver.last_plan.releases) == [0]
    assert list(driver.last_plan.decode_slots) == [1]
    driver.finish()
    assert (driver.counts.finished, driver.counts.readmissions) == (2, 0)


def test_a_sequence_alone_in_a_cache_that_is_too_small_fails_with_the_numbers():
    driver = SchedulerDriver(small_config(num_blocks=3, block_size=4))
    driver.submit(small_request("key", 10, max_tokens=20))
    error = None
    while error is None:
        plan = driver.scheduler.next_plan(driver._seq + 1)
        outputs = driver.scheduler.take_outputs()
        error = next((output.error for output in outputs if output.error), None)
        if plan is not None:
            driver._seq += 1
            for reply in driver.rank.execute(plan):
                driver.scheduler.commit(driver._seq, reply)
    assert error == (
        RESOURCE_EXHAUSTED,
        "KV cache too small: a sequence of 13 tokens needs 4 blocks of 4 tokens, the cache has 3",
    )


def test_a_sequence_that_ends_within_a_small_cache_does_not_fail():
    driver = SchedulerDriver(small_config(num_blocks=3, block_size=4))
    driver.submit(small_request("key", 10, max_tokens=3))
    driver.finish()
    assert driver.counts.failed == {}


def test_one_that_does_not_fit_leaves_the_others_alone():
    driver = SchedulerDriver(small_config(num_blocks=4, block_size=4))
    driver.submit(small_request("too large", 12, max_tokens=40))
    driver.submit(small_request("fits", 8, max_tokens=5))
    driver.finish()
    assert driver.counts.failed == {RESOURCE_EXHAUSTED: 1}
    assert driver.counts.finished == 1


def test_newcomers_leave_everybody_running_a_block_to_grow_into():
    driver = SchedulerDriver(small_config(num_blocks=6, block_size=4))
    driver.submit(small_request("running", 4, max_tokens=8))
    driver.submit(small_request("newcomer", 20, max_tokens=2))
    driver.send_plan()
    assert len(driver.last_plan.admissions) == 1
    driver.finish()
    assert driver.counts.readmissions == 0
