"""The rank's protocol state, without gRPC."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.session import AckPolicy, EpochEndedError, EpochGate, OpenVerdict, SessionProtocol

EPOCH = 7


def request(seq: int, epoch: int = EPOCH, **kind: Any) -> pb.SessionRequest:
    return pb.SessionRequest(epoch=epoch, seq=seq, **(kind or {"clear_kv_cache": pb.ClearKvCacheRequest()}))


def plan(seq: int, steps: int = 1) -> pb.SessionRequest:
    return request(seq, generate_step=pb.GenerateStepRequest(steps=steps))


def step_ok(seq: int, step: int = 0) -> pb.SessionResponse:
    return pb.SessionResponse(epoch=EPOCH, seq=seq, generate_step_ok=pb.GenerateStepOk(step=step))


def cleared(seq: int) -> pb.SessionResponse:
    return pb.SessionResponse(epoch=EPOCH, seq=seq, kv_cache_cleared=pb.KvCacheCleared())


def refused_kind(response: pb.SessionResponse | None) -> int:
    assert response is not None
    return response.error.kind


class TestSessionProtocol:
    def test_an_unknown_request_is_refused_and_the_session_lives_on(self) -> None:
        """P1"""
        protocol = SessionProtocol(EPOCH)
        refusal = protocol.receive(pb.SessionRequest(epoch=EPOCH, seq=1))
        assert refusal is not None
        assert (refusal.epoch, refusal.seq, refusal.error.kind) == (EPOCH, 1, pb.ERROR_KIND_UNKNOWN_OP)
        assert protocol.receive(request(2)) is None

    @pytest.mark.parametrize(
        ("epoch", "kind"), [(EPOCH - 1, pb.ERROR_KIND_STALE_EPOCH), (EPOCH + 1, pb.ERROR_KIND_OUT_OF_ORDER)]
    )
    def test_a_message_of_another_epoch_is_refused_and_counts_for_nothing(self, epoch: int, kind: int) -> None:
        """W25"""
        protocol = SessionProtocol(EPOCH)
        assert refused_kind(protocol.receive(request(1, epoch))) == kind
        assert protocol.receive(request(1)) is None

    @pytest.mark.parametrize("seq", [0, 2, 3])
    def test_a_seq_that_does_not_follow_is_refused(self, seq: int) -> None:
        protocol = SessionProtocol(EPOCH)
        assert refused_kind(protocol.receive(request(seq))) == pb.ERROR_KIND_OUT_OF_ORDER
        assert protocol.receive(request(1)) is None

    def test_one_control_request_is_outstanding_at_a_time(self) -> None:
        protocol = SessionProtocol(EPOCH)
        assert protocol.receive(request(1)) is None
        assert refused_kind(protocol.receive(request(2))) == pb.ERROR_KIND_OUT_OF_ORDER
        assert refused_kind(protocol.receive(plan(3))) == pb.ERROR_KIND_OUT_OF_ORDER
        assert protocol.reply(cleared(1))
        assert protocol.receive(request(4)) is None

    def test_a_control_request_gets_one_final_reply(self) -> None:
        """P1"""
        protocol = SessionProtocol(EPOCH)
        protocol.receive(request(1))
        progress = pb.SessionResponse(epoch=EPOCH, seq=1, progress=pb.Progress(what="weights"))
        assert protocol.reply(progress)
        assert protocol.reply(progress)
        assert protocol.reply(cleared(1))
        assert not protocol.reply(cleared(1))
        assert not protocol.reply(progress)

    def test_a_control_request_waits_for_the_plans_before_it_to_be_settled(self) -> None:
        """P11"""
        protocol = SessionProtocol(EPOCH)
        assert protocol.receive(plan(1, steps=2)) is None
        assert protocol.receive(plan(2)) is None
        assert refused_kind(protocol.receive(request(3))) == pb.ERROR_KIND_OUT_OF_ORDER
        assert protocol.reply(step_ok(1, step=0))
        assert protocol.reply(step_ok(1, step=1))
        assert refused_kind(protocol.receive(request(4))) == pb.ERROR_KIND_OUT_OF_ORDER
        assert protocol.reply(step_ok(2))
        assert protocol.idle
        assert protocol.receive(request(5)) is None

    def test_a_cumulative_reply_answers_every_plan_before_it(self) -> None:
        protocol = SessionProtocol(EPOCH)
        for seq in range(1, 6):
            protocol.receive(plan(seq))
        assert protocol.reply(step_ok(4))
        assert not protocol.idle
        assert not protocol.reply(step_ok(3))
        assert protocol.reply(step_ok(5))
        assert protocol.idle

    def test_an_error_answers_its_plan_alone(self) -> None:
        protocol = SessionProtocol(EPOCH)
        protocol.receive(plan(1))
        protocol.receive(plan(2))
        assert protocol.reply(pb.SessionResponse(epoch=EPOCH, seq=1, error=pb.Error()))
        assert not protocol.reply(pb.SessionResponse(epoch=EPOCH, seq=1, error=pb.Error()))
        assert protocol.reply(step_ok(2))

    def test_a_reply_of_another_epoch_stays_inside(self) -> None:
        protocol = SessionProtocol(EPOCH)
        protocol.receive(request(1))
        assert not protocol.reply(pb.SessionResponse(epoch=EPOCH - 1, seq=1, unloaded=pb.Unloaded()))

    @given(st.lists(st.sampled_from(["control", "plan", "unknown", "stale", "gap"]), max_size=30))
    def test_every_request_is_accepted_or_refused_and_answered_once(self, kinds: list[str]) -> None:
        """P1"""
        protocol = SessionProtocol(EPOCH)
        seq = 0
        for kind in kinds:
            if kind == "stale":
                assert protocol.receive(request(seq + 1, EPOCH - 1)) is not None
            elif kind == "gap":
                assert protocol.receive(request(seq + 2)) is not None
            else:
                seq += 1
                if kind == "unknown":
                    assert protocol.receive(pb.SessionRequest(epoch=EPOCH, seq=seq)) is not None
                else:
                    assert protocol.receive(plan(seq) if kind == "plan" else request(seq)) is None
                    answer = step_ok(seq) if kind == "plan" else cleared(seq)
                    assert protocol.reply(answer)
                    assert not protocol.reply(answer)
            assert protocol.idle


class TestAckPolicy:
    def test_sixteen_plans_are_answered_at_once(self) -> None:
        policy = AckPolicy()
        assert [policy.done(0.0, ack_now=False) for _ in range(33)] == ([False] * 15 + [True]) * 2 + [False]

    def test_ack_now_is_answered_at_once_and_starts_over(self) -> None:
        policy = AckPolicy(max_plans=3)
        assert not policy.done(0.0, ack_now=False)
        assert policy.done(0.0, ack_now=True)
        assert not policy.done(0.0, ack_now=False)
        assert not policy.done(0.0, ack_now=False)
        assert policy.done(0.0, ack_now=False)

    def test_a_plan_waits_at_most_50_ms(self) -> None:
        policy = AckPolicy()
        assert policy.remaining(5.0) is None
        assert not policy.done(10.0, ack_now=False)
        assert policy.remaining(10.02) == pytest.approx(0.03)
        assert policy.remaining(11.0) == 0
        assert policy.done(10.05, ack_now=False)
        assert policy.remaining(10.05) is None

    def test_after_a_flush_nothing_waits(self) -> None:
        policy = AckPolicy(max_plans=2)
        policy.done(0.0, ack_now=False)
        policy.flush()
        assert policy.remaining(1.0) is None
        assert not policy.done(1.0, ack_now=False)


class TestEpochGate:
    def test_a_second_session_of_an_epoch_is_a_duplicate(self) -> None:
        gate = EpochGate()
        assert gate.open(3) is OpenVerdict.ACCEPTED
        assert gate.open(3) is OpenVerdict.DUPLICATE
        assert gate.current == 3

    def test_a_newer_epoch_replaces_and_releases_the_older_one(self) -> None:
        """W26"""
        gate = EpochGate()
        reasons: list[str] = []
        gate.open(3)
        gate.attach(3, reasons.append)
        assert gate.open(5) is OpenVerdict.ACCEPTED
        assert len(reasons) == 1
        with pytest.raises(EpochEndedError):
            gate.check(3)
        gate.check(5)

    def test_older_and_ended_epochs_are_stale(self) -> None:
        """W25"""
        gate = EpochGate()
        gate.open(5)
        assert gate.open(4) is OpenVerdict.STALE
        gate.end(8, "test")
        assert [gate.open(epoch) for epoch in (5, 8, 9)] == [
            OpenVerdict.STALE,
            OpenVerdict.STALE,
            OpenVerdict.ACCEPTED,
        ]

    def test_ending_releases_once_and_refuses_later_attachments(self) -> None:
        gate = EpochGate()
        reasons: list[str] = []
        gate.open(3)
        gate.attach(3, reasons.append)
        gate.end(3, "first")
        gate.end(3, "second")
        assert reasons == ["first"]
        with pytest.raises(EpochEndedError):
            gate.attach(3, reasons.append)

    def test_ending_an_older_epoch_leaves_the_current_one_alone(self) -> None:
        gate = EpochGate()
        reasons: list[str] = []
        gate.open(5)
        gate.attach(5, reasons.append)
        gate.end(4, "old")
        gate.check(5)
        assert reasons == []
        assert gate.newest == 5
