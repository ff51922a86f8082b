"""The book of plans under way: what may be sent, what is late, whose tokens differ."""

from __future__ import annotations

import pytest

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import ChecksumError, ProtocolError
from tpmodel_worker.engine.plans import MAX_LAG, PlanTimes, PlanWindow, plan_size

LEAST = 5.0


def plan(steps: int = 1, decodes: int = 1, prefill: int = 0) -> worker_pb2.GenerateStepRequest:
    chunks = [worker_pb2.PrefillChunk(slot=63, length=prefill)] if prefill else []
    return worker_pb2.GenerateStepRequest(steps=steps, decode_slots=range(decodes), prefill_chunks=chunks)


def ok(step: int = 0, checksum: int = 0) -> worker_pb2.GenerateStepOk:
    return worker_pb2.GenerateStepOk(step=step, checksum=checksum)


@pytest.fixture
def times() -> PlanTimes:
    return PlanTimes(LEAST)


@pytest.fixture
def window(times: PlanTimes) -> PlanWindow:
    return PlanWindow(3, times)


def run(window: PlanWindow, seq: int, *, acks: tuple[int, ...] = (1, 2), now: float = 0.0) -> None:
    """One plan from its sending to the acknowledgements of the ranks named."""
    window.sent(seq, plan(), now)
    window.answered(seq, ok(), now)
    for rank in acks:
        window.acknowledged(rank, seq, ok(), now)


def test_plan_is_outstanding_until_rank_0_has_answered_its_last_step(window: PlanWindow) -> None:
    window.sent(1, plan(steps=2), 0.0)
    window.sent(2, plan(), 0.0)
    assert not window.may_send
    assert not window.answered(1, ok(0), 0.1)
    assert not window.may_send
    assert window.answered(1, ok(1), 0.2)
    assert window.may_send


def test_world_is_settled_when_every_rank_has_acknowledged_the_last_plan(window: PlanWindow) -> None:
    """P11."""
    assert window.settled
    window.sent(1, plan(), 0.0)
    assert not window.settled
    window.answered(1, ok(), 0.0)
    window.acknowledged(1, 1, ok(), 0.0)
    assert not window.settled
    window.acknowledged(2, 1, ok(), 0.0)
    assert window.settled


def test_world_of_one_rank_is_settled_by_rank_0_alone(times: PlanTimes) -> None:
    window = PlanWindow(1, times)
    run(window, 1, acks=())
    assert window.settled
    assert window.due() is None


def test_plan_without_steps_takes_one_answer(window: PlanWindow) -> None:
    window.sent(1, plan(steps=0, decodes=0), 0.0)
    assert window.answered(1, ok(), 0.0)


def test_acknowledgements_are_cumulative_and_may_lag_by_16_plans(window: PlanWindow) -> None:
    for seq in range(1, MAX_LAG + 1):
        run(window, seq, acks=(1,))
        assert window.may_send
    run(window, MAX_LAG + 1, acks=(1,))
    assert not window.may_send
    window.acknowledged(2, 1, ok(), 0.0)
    assert window.may_send
    window.acknowledged(2, MAX_LAG + 1, ok(), 0.0)
    assert window.settled


def test_answer_out_of_order_is_refused(window: PlanWindow) -> None:
    window.sent(1, plan(steps=2), 0.0)
    with pytest.raises(ProtocolError, match="answered plan 1, step 1, when plan 1, step 0 was due"):
        window.answered(1, ok(1), 0.0)
    with pytest.raises(ProtocolError, match="answered plan 2"):
        window.answered(2, ok(0), 0.0)


def test_answer_without_a_plan_is_refused(window: PlanWindow) -> None:
    with pytest.raises(ProtocolError, match="when no plan was due"):
        window.answered(1, ok(), 0.0)


def test_acknowledgement_of_what_was_not_sent_is_refused(window: PlanWindow) -> None:
    window.sent(1, plan(), 0.0)
    with pytest.raises(ProtocolError, match="rank 2 acknowledged plan 2 after 0; the last one sent is 1"):
        window.acknowledged(2, 2, ok(), 0.0)


def test_acknowledgement_that_goes_back_is_refused(window: PlanWindow) -> None:
    run(window, 1, acks=(1,))
    run(window, 2, acks=(1,))
    with pytest.raises(ProtocolError, match="acknowledged plan 1 after 2"):
        window.acknowledged(1, 1, ok(), 0.0)


def test_only_rank_0_may_send_tokens(window: PlanWindow) -> None:
    """P10."""
    window.sent(1, plan(), 0.0)
    with pytest.raises(ProtocolError, match="only rank 0 may"):
        window.acknowledged(1, 1, worker_pb2.GenerateStepOk(token_ids=[3]), 0.0)


def test_checksum_is_that_of_the_plans_last_step(window: PlanWindow) -> None:
    window.sent(1, plan(steps=2), 0.0)
    window.answered(1, ok(0, checksum=4), 0.0)
    window.answered(1, ok(1, checksum=5), 0.0)
    window.acknowledged(1, 1, ok(1, checksum=5), 0.0)
    with pytest.raises(ChecksumError, match="after plan 1 rank 0 has checksum 0x00000005 and rank 2 has 0x00000004"):
        window.acknowledged(2, 1, ok(1, checksum=4), 0.0)


def test_checksum_of_a_later_plan_is_compared_when_plans_between_were_not_acknowledged(window: PlanWindow) -> None:
    for seq, checksum in ((1, 10), (2, 20), (3, 30)):
        window.sent(seq, plan(), 0.0)
        window.answered(seq, ok(checksum=checksum), 0.0)
    window.acknowledged(1, 2, ok(checksum=20), 0.0)
    with pytest.raises(ChecksumError, match="after plan 3"):
        window.acknowledged(1, 3, ok(checksum=31), 0.0)


def test_rank_that_is_ahead_of_rank_0_is_compared_once_rank_0_is_there(window: PlanWindow) -> None:
    window.sent(1, plan(), 0.0)
    window.sent(2, plan(), 0.0)
    window.acknowledged(1, 1, ok(checksum=1), 0.0)
    window.acknowledged(1, 2, ok(checksum=2), 0.0)
    window.acknowledged(2, 1, ok(checksum=1), 0.0)
    window.answered(1, ok(checksum=1), 0.0)
    with pytest.raises(ChecksumError, match="after plan 2"):
        window.answered(2, ok(checksum=3), 0.0)


def test_nothing_is_due_while_nothing_is_under_way(window: PlanWindow) -> None:
    assert window.due() is None
    run(window, 1, now=3.0)
    assert window.due() is None


def test_plan_is_due_from_when_it_is_the_oldest(window: PlanWindow) -> None:
    window.sent(1, plan(), 1.0)
    window.sent(2, plan(), 1.1)
    assert window.due() == 1.0 + LEAST
    window.answered(1, ok(), 1.2)
    window.acknowledged(1, 1, ok(), 1.2)
    window.acknowledged(2, 1, ok(), 1.2)
    assert window.due() == 1.2 + LEAST


def test_slow_kinds_of_plan_get_20_times_their_mean(window: PlanWindow, times: PlanTimes) -> None:
    """P17."""
    long = plan(prefill=2000)
    times.record(plan_size(long), 1.0)
    window.sent(1, long, 0.0)
    assert window.due() == pytest.approx(20.0)
    assert times.allowance(plan_size(plan())) == LEAST


def test_durations_of_plans_make_the_mean(window: PlanWindow, times: PlanTimes) -> None:
    window.sent(1, plan(), 10.0)
    window.answered(1, ok(), 11.0)
    assert times.allowance(plan_size(plan())) == pytest.approx(20.0)


def test_rank_that_stays_behind_is_due_too(window: PlanWindow) -> None:
    """P17: also when rank 0 has nothing more to do."""
    run(window, 1, acks=(1,), now=2.0)
    assert window.due() == 2.0 + LEAST
    assert window.overdue() == (1, [2])
    window.acknowledged(2, 1, ok(), 3.0)
    assert window.due() is None


def test_rank_that_is_behind_but_moves_gets_more_time(window: PlanWindow) -> None:
    for seq in (1, 2, 3):
        run(window, seq, acks=(1,), now=2.0)
    window.acknowledged(2, 1, ok(), 6.0)
    assert window.due() == 6.0 + LEAST


def test_overdue_names_every_rank_that_has_not_done_the_oldest_plan(window: PlanWindow) -> None:
    run(window, 1)
    window.sent(2, plan(), 0.0)
    window.acknowledged(2, 2, ok(), 0.0)
    assert window.overdue() == (2, [0, 1])


def test_extension_moves_what_is_due(window: PlanWindow) -> None:
    window.sent(1, plan(), 0.0)
    window.extend(100.0)
    assert window.due() == 100.0


def test_control_request_counts_as_done_by_all(window: PlanWindow) -> None:
    run(window, 1)
    window.passed(2)
    assert window.settled
    window.sent(3, plan(), 0.0)
    with pytest.raises(ProtocolError, match="acknowledged plan 1 after 2"):
        window.acknowledged(1, 1, ok(), 0.0)
