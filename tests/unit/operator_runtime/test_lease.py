"""Leader election: what is done about a Lease as it is read, and two processes that compete."""

import asyncio
from typing import Any

import pytest

from support.fake_kube import FakeKube
from tpmodel_operator.kube import LEASES, ApiError
from tpmodel_operator.lease import DURATION_SECONDS, Leadership, LeadershipLostError, Sighting, next_step, sight


def lease(holder: str, renewed: str = "t1", seconds: int = 15) -> dict[str, Any]:
    return {"spec": {"holderIdentity": holder, "renewTime": renewed, "leaseDurationSeconds": seconds}}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def candidate(kube: FakeKube, name: str, clock: Clock) -> Leadership:
    return Leadership(kube, namespace="default", identity=name, clock=clock)


async def tries(leadership: Leadership) -> bool:
    """One attempt to get the Lease."""
    acquiring = asyncio.create_task(leadership.acquire())
    for _ in range(20):
        await asyncio.sleep(0)
    won = acquiring.done()
    acquiring.cancel()
    return won


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        (None, "create"),
        (Sighting("me", "t", 15, since=0), "renew"),
        (Sighting("", "t", 15, since=100), "take"),
        (Sighting("other", "t", 15, since=100), "wait"),
        (Sighting("other", "t", 15, since=84), "take"),
        (Sighting("other", "t", 60, since=84), "wait"),
    ],
)
def test_the_step_that_follows_from_a_sighting(seen: Sighting | None, step: str):
    assert next_step(seen, me="me", now=100) == step


def test_an_unchanged_lease_is_as_old_as_when_it_was_first_seen():
    first = sight(lease("other"), None, now=1)
    assert sight(lease("other"), first, now=5).since == 1
    assert sight(lease("other", "t2"), first, now=5).since == 5
    assert sight(lease("third"), first, now=5).since == 5


def test_the_time_that_another_clock_wrote_does_not_count():
    assert next_step(sight(lease("other", "1970-01-01T00:00:00Z"), None, now=100), me="me", now=101) == "wait"


async def test_the_first_creates_the_lease_and_the_second_waits():
    kube, clock = FakeKube(), Clock()
    assert await tries(candidate(kube, "a", clock))
    assert not await tries(candidate(kube, "b", clock))


async def test_a_silent_holder_is_followed_after_its_time():
    kube, clock = FakeKube(), Clock()
    await tries(candidate(kube, "a", clock))
    second = candidate(kube, "b", clock)
    assert not await tries(second)
    clock.now += DURATION_SECONDS - 1
    assert not await tries(second)
    clock.now += 2
    assert await tries(second)
    held = kube.objects["leases", "default", "tpmodel-operator"]["spec"]
    assert (held["holderIdentity"], held["leaseTransitions"]) == ("b", 1)


async def test_a_released_lease_is_taken_at_once():
    kube, clock = FakeKube(), Clock()
    first, second = candidate(kube, "a", clock), candidate(kube, "b", clock)
    await tries(first)
    assert not await tries(second)
    await first.release()
    assert not first.held
    assert await tries(second)


async def test_a_process_that_comes_back_under_its_name_goes_on_at_once():
    kube, clock = FakeKube(), Clock()
    await tries(candidate(kube, "a", clock))
    assert await tries(candidate(kube, "a", clock))


async def test_whoever_could_not_renew_may_not_write():
    kube, clock = FakeKube(), Clock()
    leader = candidate(kube, "a", clock)
    await tries(leader)
    leader.check()
    clock.now += 10
    with pytest.raises(LeadershipLostError):
        leader.check()


async def test_a_leader_stops_before_another_can_take_over():
    kube, clock = FakeKube(), Clock()
    first, second = candidate(kube, "a", clock), candidate(kube, "b", clock)
    await tries(first)
    for _ in range(200):
        clock.now += 0.1
        if await tries(second):
            break
    assert not first.held


async def test_a_lease_that_another_took_is_lost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tpmodel_operator.lease.RETRY_SECONDS", 0)
    kube, clock = FakeKube(), Clock()
    leader = candidate(kube, "a", clock)
    await tries(leader)
    taken = dict(kube.objects["leases", "default", "tpmodel-operator"])
    kube.put(LEASES, taken | {"spec": taken["spec"] | {"holderIdentity": "b"}})
    with pytest.raises(LeadershipLostError, match="b holds the Lease"):
        await asyncio.wait_for(leader.keep(), 1)


async def test_a_leader_outlives_a_short_outage_and_no_long_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tpmodel_operator.lease.RETRY_SECONDS", 0)
    kube, clock = FakeKube(), Clock()
    leader = candidate(kube, "a", clock)
    await tries(leader)
    kube.fail = lambda call: ApiError(0, "ClientConnectorError", "refused")
    keeping = asyncio.create_task(leader.keep())
    clock.now += 8
    await asyncio.sleep(0.01)
    assert leader.held
    kube.fail = lambda call: None
    await asyncio.sleep(0.01)
    clock.now += 8
    leader.check()
    kube.fail = lambda call: ApiError(503, "ServiceUnavailable", "")
    await asyncio.sleep(0.01)
    clock.now += 11
    with pytest.raises(LeadershipLostError):
        await asyncio.wait_for(keeping, 1)


async def test_a_renewal_whose_answer_was_lost_is_no_loss(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tpmodel_operator.lease.RETRY_SECONDS", 0)
    kube, clock = FakeKube(), Clock()
    leader = candidate(kube, "a", clock)
    await tries(leader)
    held = kube.objects["leases", "default", "tpmodel-operator"]
    kube.put(LEASES, held)  # the same content at a version that the leader does not know
    keeping = asyncio.create_task(leader.keep())
    await asyncio.sleep(0.01)
    clock.now += 9
    assert not keeping.done()
    leader.check()
    keeping.cancel()


async def test_a_candidate_looks_again_the_moment_that_the_lease_runs_out():
    kube, clock = FakeKube(), Clock()
    await tries(candidate(kube, "a", clock))
    waiting = candidate(kube, "b", clock)
    await tries(waiting)
    assert waiting._until_next_look() == 2
    clock.now += DURATION_SECONDS - 0.5
    assert waiting._until_next_look() == pytest.approx(0.55)
