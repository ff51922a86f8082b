"""Requests around which world after world is lost: who is suspected, tried alone, and failed."""

from __future__ import annotations

import pytest

from support.scheduler_driver import SchedulerDriver, small_config, small_request
from tpmodel_worker.engine.requests import INTERNAL, SequenceOutput
from tpmodel_worker.engine.scheduler import Scheduler

POISON = "poison"
PATIENCE = 60.0


class Poisoned(SchedulerDriver):
    """Ranks that die of a plan that computes the poison, before they answer."""

    def __init__(self, *, prefills: bool = False) -> None:
        """prefills: whether the poison's prompt is survived, so that only decoding it kills."""
        super().__init__(small_config(max_steps=1))
        self.losses = 0
        self._prefills = prefills

    def run(self, plans: int = 1000) -> None:
        """Sends plans, over as many worlds as that takes, until there is nothing left to do."""
        for _ in range(plans):
            if not self.send_plan():
                return
            if self._kills():
                self.losses += 1
                self.lose_world(PATIENCE)
                self.rebuild(50)
            else:
                self.deliver_all()

    def _kills(self) -> bool:
        plan = self.last_plan
        slots = set(plan.decode_slots)
        if not self._prefills:
            slots.update(chunk.slot for chunk in plan.prefill_chunks)
        running = self.scheduler._placement.running()
        return any(sequence.slot in slots and sequence.state.request.key == POISON for sequence in running)


def failed(driver: SchedulerDriver) -> list[str]:
    """Who did not bring all its tokens."""
    return [
        str(key)
        for key, expected in driver.expected.items()
        if any(sample.received != sample.outputs for sample in expected.samples.values())
    ]


def submit(driver: SchedulerDriver, *keys: str) -> None:
    for key in keys:
        assert driver.submit(small_request(key, 6, max_tokens=12))


def test_a_request_that_kills_every_world_is_failed_after_three_and_the_others_go_on() -> None:
    driver = Poisoned()
    submit(driver, "a", "b")
    driver.run(plans=4)
    submit(driver, POISON)
    driver.run()
    driver.finish()
    assert driver.losses == 3
    assert failed(driver) == [POISON]
    assert driver.counts.failed == {INTERNAL: 1}


def test_of_requests_that_came_together_only_the_one_that_kills_is_failed() -> None:
    """All of them were in the first two lost worlds without a token: the third one tries them one at a time."""
    driver = Poisoned()
    submit(driver, "a", "b", POISON, "c")
    driver.run()
    driver.finish()
    assert driver.losses == 3
    assert failed(driver) == [POISON]


def test_a_request_that_kills_when_it_decodes_is_failed_too() -> None:
    """Its prompt brings a token in each world; that does not acquit it."""
    driver = Poisoned(prefills=True)
    submit(driver, "a", POISON)
    driver.run()
    driver.finish()
    assert driver.losses == 3
    assert failed(driver) == [POISON]


def test_a_request_that_gets_on_in_every_world_is_never_failed() -> None:
    driver = SchedulerDriver(small_config(max_steps=1))
    submit(driver, "a")
    for _ in range(5):
        for _ in range(2):
            assert driver.send_plan()
            driver.deliver_all()
        driver.lose_world(PATIENCE)
        driver.rebuild(50)
    driver.finish()
    assert failed(driver) == []


def test_one_good_world_acquits_a_suspect() -> None:
    driver = SchedulerDriver(small_config(max_steps=1))
    submit(driver, "a")
    for tokens in (0, 0, 2, 0, 0, 2, 0, 0):
        driver.send_plan()
        for _ in range(tokens):
            driver.deliver_all()
            driver.send_plan()
        driver.lose_world(PATIENCE)
        driver.rebuild(50)
    driver.finish()
    assert failed(driver) == []


def test_whoever_waits_for_a_slot_is_not_suspected() -> None:
    driver = SchedulerDriver(small_config(max_steps=1, max_num_seqs=1))
    submit(driver, "a", "b")
    for _ in range(3):
        driver.send_plan()
        driver.lose_world(PATIENCE)
        driver.rebuild(50)
    driver.finish()
    assert failed(driver) == ["a"]


def test_suspects_go_before_all_others_and_new_ones_wait_for_them() -> None:
    driver = SchedulerDriver(small_config(max_steps=1))
    submit(driver, "a", "b")
    for _ in range(2):
        driver.send_plan()
        driver.lose_world(PATIENCE)
        driver.rebuild(50)
    assert driver.submit(small_request("urgent", 6, priority=-1))
    admitted: list[str] = []
    for _ in range(5):
        assert driver.send_plan()
        driver.deliver_all()
        running = driver.scheduler._placement.running()
        admitted += [str(key) for key in (s.state.request.key for s in running) if str(key) not in admitted]
    assert admitted == ["a", "b", "urgent"]
    driver.finish()


@pytest.mark.parametrize("blame", [True, False])
def test_a_world_that_ends_since_that_was_asked_for_is_held_against_nobody(blame: bool) -> None:
    scheduler = Scheduler(small_config(), clock=lambda: 1000.0, weight_version=3)
    scheduler.submit(small_request("a", 6))
    outputs: list[SequenceOutput] = []
    for _ in range(3):
        assert scheduler.next_plan(1) is not None
        scheduler.hold(PATIENCE, blame=blame)
        scheduler.rebuild(small_config())
        outputs += scheduler.take_outputs()
    assert any(output.error is not None for output in outputs) == blame
