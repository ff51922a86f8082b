"""Requests that go from one gang's scheduler to another's: what holds blocks, until when, and who goes before whom."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Hashable
from typing import Any

import pytest

from support.scheduler_driver import small_config, small_request
from support.simulated_rank import SimulatedRank, true_outputs
from tpmodel.v1 import inference_pb2, worker_pb2
from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.requests import (
    UNAVAILABLE,
    Fetch,
    InvalidRequestError,
    KeepKv,
    KvSource,
    Request,
    SchedulerConfig,
)
from tpmodel_worker.engine.scheduler import Scheduler

VOCABULARY = 9
KEPT = inference_pb2.FINISH_REASON_KEPT
SEEDS, EVENTS = 60, 250


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Gang:
    """A scheduler and a simulated rank, whose replies wait until they are delivered."""

    def __init__(self, clock: Clock, config: SchedulerConfig | None = None) -> None:
        self.config = config or small_config()
        self.clock = clock
        self.scheduler = Scheduler(self.config, clock=clock, weight_version=3)
        self.tokens: dict[Hashable, list[int]] = {}
        self.reasons: dict[Hashable, int] = {}
        self.errors: dict[Hashable, tuple[int, str]] = {}
        self.fetches: list[Fetch] = []
        self.dropped: list[Fetch] = []
        self.plans: list[worker_pb2.GenerateStepRequest] = []
        self._begin()

    def _begin(self) -> None:
        config = self.config
        self.rank = SimulatedRank(
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            slots=config.max_num_seqs,
            max_step_tokens=config.max_num_batched_tokens,
            max_len=config.max_model_len,
            vocabulary=VOCABULARY,
        )
        self._seq = 0
        self.replies: deque[tuple[int, worker_pb2.GenerateStepOk]] = deque()

    def submit(self, request: Request) -> None:
        self.scheduler.submit(request)
        self.take(self.scheduler.take_outputs())

    def plan(self) -> bool:
        plan = self.scheduler.next_plan(self._seq + 1)
        self.take(self.scheduler.take_outputs())
        self.fetches += self.scheduler.handovers.take_begun()
        self.dropped += self.scheduler.handovers.take_dropped()
        self.check()
        if plan is None:
            return False
        self.plans.append(plan)
        self._seq += 1
        self.replies += [(self._seq, reply) for reply in self.rank.execute(plan)]
        return True

    def deliver(self) -> None:
        seq, reply = self.replies.popleft()
        self.take(self.scheduler.commit(seq, reply))
        self.check()

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.plan() or self.replies:
            while self.replies:
                self.deliver()

    def expire(self, seconds: float) -> None:
        self.clock.now += seconds
        self.take(self.scheduler.expire())

    def lose_world(self) -> None:
        self.scheduler.hold(60.0)
        self._begin()
        self.fetches.clear()
        self.dropped.clear()
        self.scheduler.rebuild(self.config)

    def take(self, outputs: Any) -> None:
        for output in outputs:
            self.tokens.setdefault(output.key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.reasons[output.key] = output.finish_reason
            if output.error is not None:
                self.errors[output.key] = output.error

    @property
    def used(self) -> int:
        return self.scheduler.blocks_used

    def check(self) -> None:
        """Every block has as many holders as there are sequences, kept and receiving ones that have it."""
        placement = self.scheduler._placement
        held: Counter[int] = Counter()
        for sequence in [*placement.running(), *placement.receiving]:
            held.update(sequence.blocks)
        for kept in placement.kept._by_ticket.values():
            held.update(kept.blocks)
        for block in range(self.config.num_blocks):
            assert placement.pool.references(block) == held[block], f"block {block}"
        slots = [sequence.slot for sequence in [*placement.running(), *placement.receiving]]
        slots += [kept.slot for kept in placement.kept._by_ticket.values() if kept.slot >= 0]
        assert sorted([*slots, *placement._free_slots]) == list(range(self.config.max_num_seqs))


def keeping(key: str, prompt: Any = 9, *, seconds: float = 30.0, ticket: str = "", **options: Any) -> Request:
    request = small_request(key, prompt, **options)
    return Request(
        key=key,
        request_id=key,
        prompt_token_ids=request.prompt_token_ids,
        sampling=request.sampling,
        keep_kv=KeepKv(ticket or f"ticket of {key}", seconds),
    )


def continuing(first: Request, outputs: list[int], **changes: Any) -> Request:
    """The request as the other gang gets it."""
    assert first.keep_kv is not None
    values: dict[str, Any] = {
        "key": first.key,
        "request_id": first.request_id,
        "prompt_token_ids": first.prompt_token_ids,
        "resume_token_ids": outputs,
        "sampling": first.sampling,
        "kv_source": KvSource("127.0.0.1:9001", first.keep_kv.ticket),
    }
    return Request(**(values | changes))


def move(kept: Kept, sender: Gang, fetch: Fetch, receiver: Gang) -> None:
    """What the ranks do."""
    assert kept.tokens == fetch.tokens
    assert list(kept.token_ids) == list(fetch.token_ids)
    receiver.rank.write_kv(list(fetch.blocks), sender.rank.read_kv(kept.blocks, kept.tokens))


def expected(request: Request) -> list[int]:
    return true_outputs(request.prompt_token_ids, request.sampling, VOCABULARY)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def prefill(clock: Clock) -> Gang:
    return Gang(clock)


@pytest.fixture
def decode(clock: Clock) -> Gang:
    return Gang(clock)


def test_a_request_that_is_handed_over_ends_behind_its_first_token_and_holds_its_blocks(prefill: Gang) -> None:
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    assert prefill.tokens["a"] == expected(request)[:1]
    assert prefill.reasons["a"] == KEPT
    assert prefill.used == 3
    assert (prefill.scheduler.running, prefill.scheduler.waiting, prefill.scheduler.has_work) == (0, 0, False)
    assert not prefill.rank.slots, "its slot is free for others"


def test_what_nobody_fetches_expires(prefill: Gang) -> None:
    prefill.submit(keeping("a", seconds=5.0))
    prefill.run()
    assert prefill.scheduler.next_deadline == prefill.clock.now + 5.0
    prefill.expire(4.9)
    assert prefill.used == 3
    prefill.expire(0.1)
    assert prefill.used == 0
    assert prefill.scheduler.handovers.find("ticket of a") is None
    assert prefill.scheduler.next_deadline is None


def test_an_answer_that_is_whole_is_not_kept(prefill: Gang) -> None:
    """By a stop id, or since one token was all that was wanted."""
    request = keeping("a", max_tokens=1)
    prefill.submit(request)
    prefill.run()
    first = expected(keeping("b"))[0]
    prefill.submit(keeping("b", stops=[first]))
    prefill.run()
    assert prefill.reasons == {"a": inference_pb2.FINISH_REASON_LENGTH, "b": inference_pb2.FINISH_REASON_STOP}
    assert prefill.used == 0


def test_the_other_gang_goes_on_with_the_same_tokens(prefill: Gang, decode: Gang) -> None:
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    decode.submit(continuing(request, prefill.tokens["a"]))
    decode.run()
    (fetch,) = decode.fetches
    assert decode.used == 3
    assert not decode.plans, "nothing is known to the ranks before the KV is there"
    kept = prefill.scheduler.handovers.find("ticket of a")
    assert kept is not None
    prefill.scheduler.handovers.begin(kept)
    move(kept, prefill, fetch, decode)
    prefill.scheduler.end_handover(kept, fetched=True)
    decode.scheduler.fetched(fetch)
    decode.run()
    (admission,) = decode.plans[0].admissions
    assert (admission.computed_length, admission.prompt_length) == (9, 9)
    assert [chunk.length for chunk in decode.plans[0].prefill_chunks] == [1]
    assert prefill.tokens["a"] + decode.tokens["a"] == expected(request)
    assert prefill.used == decode.used == 0


def test_a_models_state_keeps_its_slot_and_comes_into_one(clock: Clock) -> None:
    config = small_config(prefix_cache=False, share_blocks=False)
    prefill, decode = Gang(clock, config), Gang(clock, config)
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    kept = prefill.scheduler.handovers.find("ticket of a")
    assert kept is not None
    assert kept.slot in prefill.rank.slots
    decode.submit(continuing(request, prefill.tokens["a"]))
    decode.run()
    (fetch,) = decode.fetches
    move(kept, prefill, fetch, decode)
    decode.scheduler.fetched(fetch)
    decode.run()
    (admission,) = decode.plans[0].admissions
    assert admission.state_received
    assert admission.slot == fetch.slot
    prefill.expire(31.0)
    prefill.run()
    assert not prefill.rank.slots
    assert list(prefill.plans[-1].releases) == [kept.slot]


def test_a_fetch_that_fails_fails_its_request_and_frees_its_blocks(prefill: Gang, decode: Gang) -> None:
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    decode.submit(continuing(request, prefill.tokens["a"]))
    decode.run()
    kept = prefill.scheduler.handovers.find("ticket of a")
    assert kept is not None
    prefill.scheduler.handovers.begin(kept)
    decode.scheduler.fetch_failed(decode.fetches[0], UNAVAILABLE, "a rank was lost")
    decode.take(decode.scheduler.take_outputs())
    decode.run()
    assert decode.errors["a"] == (UNAVAILABLE, "a rank was lost")
    assert decode.used == 0
    assert not decode.plans
    # The other gang keeps it for another try, but not for longer.
    prefill.scheduler.end_handover(kept, fetched=False)
    assert prefill.used == 3
    prefill.expire(30.0)
    assert prefill.used == 0


def test_what_is_being_fetched_outlives_its_time(prefill: Gang) -> None:
    """Its blocks are read: they go when that is over."""
    prefill.submit(keeping("a", seconds=5.0))
    prefill.run()
    kept = prefill.scheduler.handovers.find("ticket of a")
    assert kept is not None
    prefill.scheduler.handovers.begin(kept)
    prefill.expire(6.0)
    assert prefill.used == 3
    prefill.scheduler.end_handover(kept, fetched=False)
    assert prefill.used == 0


def test_a_request_that_ends_while_its_kv_comes_holds_its_blocks_until_that_is_over(
    prefill: Gang, decode: Gang
) -> None:
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    decode.submit(continuing(request, prefill.tokens["a"]))
    decode.run()
    assert decode.scheduler.cancel("a")
    decode.run()
    assert decode.dropped == decode.fetches
    assert decode.used == 3
    decode.scheduler.fetched(decode.fetches[0])
    decode.run()
    assert decode.used == 0
    assert not decode.plans
    assert not decode.errors


def test_with_the_world_lost_the_request_is_computed_from_its_prompt(prefill: Gang, decode: Gang) -> None:
    request = keeping("a")
    prefill.submit(request)
    prefill.run()
    decode.submit(continuing(request, prefill.tokens["a"]))
    decode.run()
    (late,) = decode.fetches
    decode.lose_world()
    decode.scheduler.fetched(late)
    decode.run()
    (admission,) = decode.plans[0].admissions
    assert admission.computed_length == 0
    assert prefill.tokens["a"] + decode.tokens["a"] == expected(request)
    prefill.lose_world()
    assert prefill.used == 0
    assert prefill.scheduler.handovers.find("ticket of a") is None


def test_running_requests_go_before_what_is_kept(clock: Clock) -> None:
    """The oldest that nobody fetches makes room; what is being fetched does not."""
    gang = Gang(clock, small_config(num_blocks=9, prefix_cache=False))
    for key in ("old", "new"):
        gang.submit(keeping(key, 8))
        gang.run()
    assert gang.used == 4
    fetched = gang.scheduler.handovers.find("ticket of old")
    assert fetched is not None
    gang.scheduler.handovers.begin(fetched)
    long = small_request("long", 8, max_tokens=20)
    gang.submit(long)
    gang.run()
    assert gang.tokens["long"] == expected(long)
    assert gang.scheduler.handovers.find("ticket of new") is None
    assert gang.scheduler.handovers.find("ticket of old") is fetched
    assert gang.used == 2


def test_a_request_that_lacks_blocks_waits_for_what_is_being_fetched(clock: Clock) -> None:
    """It is not given up: the blocks come back."""
    gang = Gang(clock, small_config(num_blocks=6, prefix_cache=False))
    gang.submit(keeping("kept", 8))
    gang.run()
    kept = gang.scheduler.handovers.find("ticket of kept")
    assert kept is not None
    gang.scheduler.handovers.begin(kept)
    long = small_request("long", 8, max_tokens=16)
    gang.submit(long)
    gang.run()
    assert gang.scheduler.running == 1
    assert not gang.errors
    gang.scheduler.end_handover(kept, fetched=True)
    gang.run()
    assert gang.tokens["long"] == expected(long)


@pytest.mark.parametrize("what", ["keep_kv", "kv_source"])
def test_several_samples_are_not_handed_over(prefill: Gang, what: str) -> None:
    base = small_request("a", 5, n=2)
    changes: dict[str, Any] = {"keep_kv": KeepKv("t", 1.0)} if what == "keep_kv" else {}
    if what == "kv_source":
        changes = {"kv_source": KvSource("h:1", "t"), "resume_token_ids": [1]}
    values = {"key": "a", "request_id": "a", "prompt_token_ids": [1], "sampling": base.sampling, "n": 2}
    with pytest.raises(InvalidRequestError, match="n is 2"):
        prefill.scheduler.submit(Request(**(values | changes)))


def test_random_handovers_leak_nothing_and_change_no_token() -> None:
    """Two gangs with little memory: expiry, failures, cancels, lost worlds, preemption, others' requests beside."""
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen += RandomHandovers(seed).run()
    for event in ("continued", "failed", "expired", "cancelled", "lost", "whole", "preempted", "refused"):
        assert seen[event] > 20, f"{event}: {seen}"


class RandomHandovers:
    """One seed's events."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seen: Counter[str] = Counter()
        clock = Clock()
        state = self.random.random() < 0.3
        config = small_config(
            num_blocks=self.random.choice([8, 12, 20]),
            max_num_seqs=self.random.choice([2, 4]),
            prefix_cache=not state and self.random.random() < 0.5,
            share_blocks=not state,
            queue_limit=100,
        )
        self.gangs = {name: Gang(clock, config) for name in ("prefill", "decode")}
        self.requests: dict[Hashable, Request] = {}
        self.moving: list[tuple[Fetch, Kept]] = []
        self.handed: set[Hashable] = set()
        self.gone: set[Hashable] = set()

    def run(self) -> Counter[str]:
        events = [self.submit, self.submit_beside, self.step, self.step, self.step, self.step, self.hand_over]
        events += [self.begin_moving, self.end_moving, self.cancel, self.wait, self.lose]
        weights = [6, 2, 10, 10, 10, 10, 6, 8, 8, 1, 2, 0.3]
        for event in self.random.choices(events, weights, k=EVENTS):
            event()
        self.finish()
        return self.seen

    def submit(self) -> None:
        key = f"request {len(self.requests)}"
        request = keeping(key, self.random.randint(1, 20), seconds=5.0, max_tokens=8, ticket=key)
        self.requests[key] = request
        self.gangs["prefill"].submit(request)

    def submit_beside(self) -> None:
        key = f"beside {len(self.requests)}"
        request = small_request(key, self.random.randint(1, 20), max_tokens=8)
        self.requests[key] = request
        self.gangs[self.random.choice(["prefill", "decode"])].submit(request)

    def step(self) -> None:
        gang = self.random.choice(list(self.gangs.values()))
        if gang.replies and (len(gang.replies) > 3 or self.random.random() < 0.5):
            gang.deliver()
        elif gang.scheduler.outstanding_plans < 2:
            gang.plan()

    def hand_over(self) -> None:
        ready = [key for key, reason in self.gangs["prefill"].reasons.items() if reason == KEPT]
        ready = [key for key in ready if key not in self.handed]
        if ready:
            key = self.random.choice(ready)
            self.handed.add(key)
            first = list(self.gangs["prefill"].tokens[key])
            self.gangs["decode"].submit(continuing(self.requests[key], first))

    def begin_moving(self) -> None:
        """As the prefill gang answers the other one's call."""
        decode, prefill = self.gangs["decode"], self.gangs["prefill"]
        if not decode.fetches:
            return
        fetch = decode.fetches.pop(0)
        kept = prefill.scheduler.handovers.find(fetch.source.ticket)
        if kept is None or kept.fetching:
            decode.scheduler.fetch_failed(fetch, 9, "nothing is kept")
            self.seen["refused"] += 1
            return
        prefill.scheduler.handovers.begin(kept)
        self.moving.append((fetch, kept))

    def end_moving(self) -> None:
        if not self.moving:
            return
        fetch, kept = self.moving.pop(self.random.randrange(len(self.moving)))
        decode, prefill = self.gangs["decode"], self.gangs["prefill"]
        there = prefill.scheduler.handovers.find(kept.ticket) is kept
        fine = there and self.random.random() < 0.8
        if fine and not self._is_stale(fetch):
            move(kept, prefill, fetch, decode)
            decode.scheduler.fetched(fetch)
            self.seen["continued"] += 1
        else:
            decode.scheduler.fetch_failed(fetch, UNAVAILABLE, "it failed")
            self.seen["failed"] += 1
        prefill.scheduler.end_handover(kept, fetched=fine)
        decode.take(decode.scheduler.take_outputs())

    def _is_stale(self, fetch: Fetch) -> bool:
        return fetch not in self.gangs["decode"].scheduler.handovers._receiving

    def cancel(self) -> None:
        gang = self.random.choice(list(self.gangs.values()))
        live = [key for key in self.requests if key in gang.scheduler._live]
        if live:
            key = self.random.choice(live)
            gang.scheduler.cancel(key)
            self.gone.add(key)
            self.seen["cancelled"] += 1

    def wait(self) -> None:
        kept = self.gangs["prefill"].scheduler._placement.kept
        before = len(kept)
        for gang in self.gangs.values():
            gang.expire(1.0)
        self.seen["expired"] += before - len(kept)

    def lose(self) -> None:
        self.random.choice(list(self.gangs.values())).lose_world()
        self.seen["lost"] += 1

    def finish(self) -> None:
        decode, prefill = self.gangs["decode"], self.gangs["prefill"]
        for _ in range(200):
            # What waits for room gets it when something has expired, and may then be kept itself.
            prefill.run()
            decode.run()
            self.begin_moving()
            self.end_moving()
            prefill.expire(1.0)
        for gang in self.gangs.values():
            gang.check()
            assert gang.used == 0, "a block leaked"
            assert not gang.rank.slots, "a slot leaked"
            assert gang.scheduler.waiting == gang.scheduler.running == 0
            self.seen["preempted"] += gang.scheduler.counts.preemptions
        self._check_tokens(prefill, decode)

    def _check_tokens(self, prefill: Gang, decode: Gang) -> None:
        for key, request in self.requests.items():
            tokens = prefill.tokens.get(key, []) + decode.tokens.get(key, [])
            outputs = expected(request)
            assert tokens == outputs[: len(tokens)], "not the true tokens"
            ended = key not in self.gone and key not in decode.errors and key not in prefill.errors
            if ended and (key in self.handed or request.keep_kv is None):
                assert tokens == outputs, "not all tokens"
                self.seen["whole"] += 1
