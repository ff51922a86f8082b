"""Prefix caching of models with recurrent state: a snapshot behind the blocks, or the sequence begins anew.

The simulated rank knows which tokens every state and every snapshot has seen, and refuses any other.
"""

from __future__ import annotations

import pytest

from support.scheduler_driver import SchedulerDriver, small_config, small_request
from tpmodel_worker.engine.requests import SchedulerConfig
from tpmodel_worker.engine.snapshots import StateSnapshots

BLOCK = 4


def state_config(
    *,
    num_blocks: int = 50,
    snapshots: int = 8,
    interval: int = 1,
    step_tokens: int = 32,
    prefix_cache: bool = True,
) -> SchedulerConfig:
    return small_config(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_num_batched_tokens=step_tokens,
        prefix_cache=prefix_cache,
        share_blocks=False,
        state_snapshots=snapshots,
        snapshot_interval_blocks=interval,
    )


def cached(driver: SchedulerDriver, key: str, prompt: list[int], *, max_tokens: int = 2) -> int:
    """Runs a request to its end; how many of its tokens were not computed."""
    before = driver.scheduler.counts.prefix_hits
    driver.submit(small_request(key, prompt, max_tokens=max_tokens))
    driver.finish()
    return driver.scheduler.counts.prefix_hits - before


def test_a_prompt_that_comes_again_begins_behind_its_last_whole_block() -> None:
    driver = SchedulerDriver(state_config())
    prompt = list(range(100, 118))
    assert [cached(driver, key, prompt) for key in ("first", "again")] == [0, 16]
    assert driver.rank.computed_tokens == 18 + 1 + 2 + 1


def test_a_prompt_of_whole_blocks_leaves_one_to_compute() -> None:
    driver = SchedulerDriver(state_config())
    prompt = list(range(100, 116))
    assert [cached(driver, key, prompt) for key in ("first", "again")] == [0, 12]


def test_each_turn_of_a_chat_begins_behind_the_prompt_of_the_last() -> None:
    driver = SchedulerDriver(state_config())
    prompt, hits = list(range(100, 110)), []
    for turn in range(4):
        hits.append(cached(driver, f"turn {turn}", prompt, max_tokens=5))
        prompt = [*prompt, *driver.outputs_of(f"turn {turn}"), 200 + turn, 300 + turn]
    assert hits == [0, 8, 16, 24]


def test_prompts_that_part_amid_a_block_go_on_from_the_snapshot_before_it() -> None:
    driver = SchedulerDriver(state_config())
    common = list(range(100, 109))
    assert cached(driver, "one", [*common, 1, 2, 3, 4, 5]) == 0
    # Its blocks are known up to 8 tokens, but the only snapshot lies behind 12, where the prompts have parted.
    assert cached(driver, "two", [*common, 6, 7, 8, 9, 10]) == 0
    # The second one has left a snapshot where it parted from the first.
    assert cached(driver, "three", [*common, 8, 7, 6, 5, 4]) == 8


def test_a_long_prompt_has_snapshots_where_its_chunks_end() -> None:
    driver = SchedulerDriver(state_config(step_tokens=10))
    prompt = list(range(100, 130))
    cached(driver, "long", prompt)
    for length, hits in ((27, 24), (23, 16), (15, 8)):
        driver = SchedulerDriver(state_config(step_tokens=10))
        cached(driver, "long", prompt)
        assert cached(driver, "short", prompt[:length]) == hits


def test_snapshots_of_a_sequence_keep_their_distance() -> None:
    driver = SchedulerDriver(state_config(step_tokens=10, interval=3))
    cached(driver, "long", list(range(100, 140)))
    assert driver.counts.state_saves == 2  # behind 20 and 36 tokens
    cached(driver, "short", list(range(200, 211)))
    assert driver.counts.state_saves == 2


def test_a_snapshot_goes_with_its_block() -> None:
    driver = SchedulerDriver(state_config(num_blocks=8))
    prompt = list(range(100, 118))
    cached(driver, "first", prompt)
    cached(driver, "other", list(range(200, 226)))
    assert cached(driver, "again", prompt) < 16


def test_the_snapshot_that_was_used_least_recently_makes_room() -> None:
    driver = SchedulerDriver(state_config(snapshots=2))
    prompts = {key: list(range(start, start + 9)) for key, start in (("a", 100), ("b", 200), ("c", 300))}
    cached(driver, "a", prompts["a"])
    cached(driver, "b", prompts["b"])
    assert cached(driver, "a again", prompts["a"]) == 8
    cached(driver, "c", prompts["c"])
    assert cached(driver, "b again", prompts["b"]) == 0


@pytest.mark.parametrize("snapshots", [1, 2])
def test_a_plan_makes_no_more_snapshots_than_there_are(snapshots: int) -> None:
    driver = SchedulerDriver(state_config(snapshots=snapshots))
    for key in ("a", "b", "c"):
        driver.submit(small_request(key, 9))
    assert driver.send_plan()
    assert len(driver.last_plan.state_saves) == snapshots
    driver.finish()


def test_a_preempted_sequence_goes_on_behind_its_newest_snapshot() -> None:
    driver = SchedulerDriver(state_config(num_blocks=10))
    for key in ("a", "b"):
        driver.submit(small_request(key, 14, max_tokens=12))
    driver.finish()
    assert driver.scheduler.counts.preemptions > 0
    assert driver.counts.state_restores > 0


def test_another_world_has_no_snapshots() -> None:
    """P17: a rank that was replaced has none of them."""
    driver = SchedulerDriver(state_config())
    prompt = list(range(100, 118))
    cached(driver, "first", prompt)
    driver.rebuild(50)
    assert cached(driver, "again", prompt) == 0


def test_snapshots_of_other_weights_are_never_used() -> None:
    """U35."""
    driver = SchedulerDriver(state_config())
    prompt = list(range(100, 118))
    assert [cached(driver, key, prompt) for key in ("first", "again")] == [0, 16]
    driver.adopt_weights(4)
    assert [cached(driver, key, prompt) for key in ("of the new ones", "and again")] == [0, 16]


def test_a_sequence_that_was_cancelled_leaves_a_snapshot_of_what_was_computed() -> None:
    driver = SchedulerDriver(state_config(step_tokens=10))
    prompt = list(range(100, 130))
    driver.submit(small_request("gone", prompt))
    driver.send_plan()
    driver.cancel("gone")
    assert cached(driver, "again", prompt) == 8


def test_without_a_prefix_cache_there_are_no_snapshots() -> None:
    driver = SchedulerDriver(state_config(prefix_cache=False))
    cached(driver, "first", list(range(100, 118)))
    assert (cached(driver, "again", list(range(100, 118))), driver.counts.state_saves) == (0, 0)


def test_a_place_is_given_away_again_once_nobody_finds_the_block() -> None:
    snapshots = StateSnapshots(1, block_size=BLOCK, interval_blocks=1)
    assert snapshots.add(b"one") == 0
    assert snapshots.add(b"one") is None
    snapshots.forget(b"one")
    snapshots.forget(b"never known")
    assert snapshots.newest([b"one"]) == 0
    assert snapshots.add(b"two") == 0
    assert snapshots.newest([b"one", b"two", b"three"]) == 2
