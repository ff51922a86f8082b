"""The scheduler against a simulated rank: whatever happens in whatever order, the driver's checks hold.

After every plan: no block has two writers, none leaks, no uncommitted id is hashed, the rank's slots are
the scheduler's. At the end: every sample brought its true tokens, once, and every request ended once.
"""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.scale import SCHEDULER_EVENTS, SCHEDULER_MACHINES, SCHEDULER_SEEDS
from support.scheduler_driver import VOCABULARY, SchedulerDriver
from support.simulated_rank import STOP_ID, true_outputs
from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.requests import Request, SchedulerConfig


def make_config(choices: random.Random) -> SchedulerConfig:
    block_size = choices.choice([1, 2, 4])
    keeps_state = choices.random() < 0.35
    snapshots = choices.choice([0, 1, 2, 9]) if keeps_state else 0
    return SchedulerConfig(
        num_blocks=choices.choice([6, 12, 24, 60]),
        block_size=block_size,
        max_num_seqs=choices.choice([1, 3, 8]),
        max_num_batched_tokens=choices.choice([2, 7, 16, 64]),
        max_model_len=choices.choice([16, 40]),
        queue_limit=choices.choice([2, 12]),
        prefix_cache=choices.random() < 0.75 and (not keeps_state or snapshots > 0),
        share_blocks=not keeps_state,
        state_snapshots=snapshots,
        snapshot_interval_blocks=choices.choice([1, 1, 3]),
        max_steps=choices.choice([1, 3, 8]),
        multi_step_budget_seconds=0.005,
    )


def make_request(choices: random.Random, key: int, max_model_len: int, now: float) -> Request:
    """A request whose prompt shares a beginning with others', and which may continue a stream."""
    family = choices.randrange(3)
    shared = [1 + (family * 5 + position) % (VOCABULARY - 1) for position in range(choices.choice([0, 3, 8, 17]))]
    own = [choices.randrange(VOCABULARY) for _ in range(choices.choice([0, 1, 2, 6]))]
    prompt = (shared + own) or [key % VOCABULARY]
    sampling = worker_pb2.SlotSampling(
        seed=choices.randrange(3),
        sample_index=choices.choice([0, 0, 0, 2]),
        max_tokens=choices.choice([0, 1, 2, 5, 20]),
        min_tokens=choices.choice([0, 0, 3]),
        stop_token_ids=choices.choice([[], [STOP_ID], [STOP_ID, 1, 2]]),
        logprobs=choices.choice([-1, -1, 0]),
    )
    n = choices.choice([1, 1, 1, 2, 4])
    resumed: list[int] = []
    if n == 1 and len(prompt) < max_model_len and choices.random() < 0.15:
        resolved = worker_pb2.SlotSampling()
        resolved.CopyFrom(sampling)
        room = max_model_len - len(prompt)
        resolved.max_tokens = min(room, sampling.max_tokens or room)
        outputs = true_outputs(prompt, resolved, VOCABULARY)
        resumed = outputs[: choices.randint(0, len(outputs))]
    return Request(
        key=key,
        request_id=str(key),
        prompt_token_ids=prompt,
        resume_token_ids=resumed,
        sampling=sampling,
        n=n,
        priority=choices.choice([0, 0, 0, -1, 1]),
        deadline=now + choices.uniform(0.1, 30) if choices.random() < 0.2 else None,
    )


def cancel_something(driver: SchedulerDriver, choices: random.Random) -> None:
    key = choices.choice(driver.open_keys)
    samples = list(driver.expected[key].samples)
    driver.cancel(key, choices.choice([None, *samples]))


def lose_and_rebuild(driver: SchedulerDriver, choices: random.Random, key: int) -> None:
    """A fault of the world; requests come, leave and run out of time before the next one."""
    driver.lose_world(choices.choice([1.0, 30.0]))
    for more in range(choices.choice([0, 1, 4])):
        driver.submit(make_request(choices, key + more, driver.config.max_model_len, driver.now))
        if driver.open_keys and choices.random() < 0.2:
            cancel_something(driver, choices)
        driver.advance(choices.choice([0.0, 0.3, 2.0]))
    driver.rebuild(choices.choice([6, driver.config.num_blocks, 60]))


def run_random_events(seed: int, events: int) -> SchedulerDriver:
    choices = random.Random(seed)
    config = make_config(choices)
    driver = SchedulerDriver(config, step_seconds=choices.choice([0.0, 0.001, 0.01]))
    delay = choices.choice([0, 1, 2])
    arrivals = choices.choice([0.05, 0.2, 0.5])
    for event in range(events):
        happening = choices.random()
        if happening < arrivals:
            driver.submit(make_request(choices, event, config.max_model_len, driver.now))
        elif happening < arrivals + 0.03 and driver.open_keys:
            cancel_something(driver, choices)
        elif happening < arrivals + 0.05:
            driver.advance(choices.uniform(0, 3))
        elif happening < arrivals + 0.053:
            lose_and_rebuild(driver, choices, key=10_000 + 10 * event)
        elif happening < arrivals + 0.055:
            driver.fail_all()
        elif driver.outstanding_plans <= delay and driver.send_plan():
            pass
        else:
            driver.deliver()
    driver.finish()
    return driver


def test_random_events_never_break_the_scheduler():
    """DESIGN section 9; P14: random EOS, cancels, n, priorities, preemption, shared prefixes, late replies."""
    seen: Counter[str] = Counter()
    for seed in range(SCHEDULER_SEEDS):
        try:
            counts = run_random_events(seed, SCHEDULER_EVENTS).counts
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        seen.update(
            plans=counts.plans,
            multi_step_plans=counts.multi_step_plans,
            release_plans=counts.release_plans,
            block_copies=counts.block_copies,
            cached_tokens=counts.cached_tokens,
            state_saves=counts.state_saves,
            state_restores=counts.state_restores,
            readmissions=counts.readmissions,
            overrun_tokens=counts.overrun_tokens,
            finished=counts.finished,
            failed=sum(counts.failed.values()),
        )
    print(dict(seen))
    assert min(seen.values()) >= SCHEDULER_SEEDS // 10, "the events did not reach everything"


class SchedulerMachine(RuleBasedStateMachine):
    """The same events, chosen by hypothesis, which shrinks what fails."""

    @initialize(choices=st.randoms(use_true_random=False))
    def start(self, choices: random.Random) -> None:
        self.config = make_config(choices)
        self.driver = SchedulerDriver(self.config, step_seconds=0.001)
        self.key = 0

    @rule(choices=st.randoms(use_true_random=False))
    def submit(self, choices: random.Random) -> None:
        self.key += 1
        self.driver.submit(make_request(choices, self.key, self.config.max_model_len, self.driver.now))

    @precondition(lambda self: self.driver.outstanding_plans <= 2)
    @rule()
    def send_plan(self) -> None:
        self.driver.send_plan()

    @precondition(lambda self: self.driver.outstanding_plans)
    @rule()
    def deliver(self) -> None:
        self.driver.deliver()

    @precondition(lambda self: self.driver.open_keys)
    @rule(choices=st.randoms(use_true_random=False))
    def cancel(self, choices: random.Random) -> None:
        cancel_something(self.driver, choices)

    @rule(seconds=st.floats(0, 10))
    def advance(self, seconds: float) -> None:
        self.driver.advance(seconds)

    @rule(choices=st.randoms(use_true_random=False))
    def lose_and_rebuild(self, choices: random.Random) -> None:
        self.key += 10
        lose_and_rebuild(self.driver, choices, self.key - 9)

    @rule(num_blocks=st.sampled_from([6, 24, 60]))
    def rebuild(self, num_blocks: int) -> None:
        self.driver.rebuild(num_blocks)

    @invariant()
    def nothing_is_lost(self) -> None:
        self.driver.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


class TestSchedulerMachine(SchedulerMachine.TestCase):
    settings = settings(
        max_examples=SCHEDULER_MACHINES,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
