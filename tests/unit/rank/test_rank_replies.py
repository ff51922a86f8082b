"""Replies of an epoch: every step from rank 0, cumulative ones from the others, and their checksum."""

from __future__ import annotations

import queue
import struct
import time
from collections.abc import Callable, Iterator

import google_crc32c
import numpy as np
import pytest
import torch

from tpmodel.v1 import worker_pb2 as pb
from tpmodel_worker.rank.logprobs import SampledLogprobs
from tpmodel_worker.rank.replies import ReplyThread, StepLogprobs, StepOutcome
from tpmodel_worker.rank.status import StatusBoard
from tpmodel_worker.rank.upload import HostCopy

EPOCH = 3
Row = tuple[int, int, int]
"""Slot, token id, Finished."""


class Replies:
    def __init__(self, rank: int) -> None:
        self.sent: queue.Queue[pb.SessionResponse] = queue.Queue()
        self.status = StatusBoard(rank=rank, device="cpu", threads=1)
        self.thread = ReplyThread(EPOCH, rank=rank, status=self.status, send=self.sent.put)

    def next(self) -> pb.SessionResponse:
        return self.sent.get(timeout=5)


@pytest.fixture
def make_replies() -> Iterator[Callable[[int], Replies]]:
    made: list[Replies] = []

    def make(rank: int) -> Replies:
        made.append(Replies(rank))
        return made[-1]

    yield make
    for replies in made:
        assert replies.thread.close(5.0)


def outcome(
    seq: int, *rows: Row, idle: int | None = None, step: int = 0, last: bool = True, ack_now: bool = False
) -> StepOutcome:
    """A step of these rows; idle: one more slot, which has finished before."""
    slots, tokens, finished = (list(column) for column in zip(*rows, strict=True))
    active = [1] * len(rows)
    if idle is not None:
        slots, tokens, finished, active = [*slots, idle], [*tokens, 9], [*finished, 1], [*active, 0]
    return StepOutcome(
        seq=seq,
        step=step,
        last=last,
        ack_now=ack_now,
        started=time.perf_counter(),
        slots=np.array(slots),
        sampled=HostCopy(torch.tensor([tokens, finished, active])),
    )


def checksum(*words: tuple[int, int, int, int, int]) -> int:
    """By the contract: CRC-32C over little-endian 64-bit words."""
    return google_crc32c.value(b"".join(struct.pack("<5Q", *entry) for entry in words))


def test_rank_0_answers_every_step_with_slots_ascending(make_replies: Callable[[int], Replies]) -> None:
    """P10"""
    replies = make_replies(0)
    replies.thread.step(outcome(4, (2, 50, 0), (5, 51, 1), (0, 52, 2), last=False))
    replies.thread.step(outcome(4, (2, 60, 0), step=1))
    first, second = replies.next(), replies.next()
    assert (first.epoch, first.seq, first.generate_step_ok.step) == (EPOCH, 4, 0)
    assert list(first.generate_step_ok.slots) == [0, 2, 5]
    assert list(first.generate_step_ok.token_ids) == [52, 50, 51]
    assert list(first.generate_step_ok.finished) == [pb.FINISHED_LENGTH, 0, pb.FINISHED_STOP]
    assert first.generate_step_ok.seconds > 0
    assert second.generate_step_ok.step == 1


def test_the_checksum_runs_over_what_was_sampled(make_replies: Callable[[int], Replies]) -> None:
    """P11"""
    entries = [(4, 0, 0, 52, 2), (4, 0, 2, 50, 0), (5, 0, 2, 60, 0)]
    for rank in (0, 1):
        replies = make_replies(rank)
        replies.thread.step(outcome(4, (2, 50, 0), (0, 52, 2), ack_now=True))
        assert replies.next().generate_step_ok.checksum == checksum(*entries[:2])
        replies.thread.step(outcome(5, (2, 60, 0), idle=0, ack_now=True))
        assert replies.next().generate_step_ok.checksum == checksum(*entries)
        assert (replies.status.status().checksum, replies.status.status().last_seq) == (checksum(*entries), 5)


def test_an_idle_slot_is_not_reported(make_replies: Callable[[int], Replies]) -> None:
    replies = make_replies(0)
    replies.thread.step(outcome(1, (1, 50, 0), idle=0))
    assert list(replies.next().generate_step_ok.slots) == [1]


def test_other_ranks_answer_sixteen_plans_at_once_and_never_with_tokens(make_replies: Callable[[int], Replies]) -> None:
    """P10, P11"""
    replies = make_replies(1)
    for seq in range(1, 17):
        replies.thread.step(outcome(seq, (0, 50, 0), last=False))
        replies.thread.step(outcome(seq, (0, 51, 0), step=1))
    reply = replies.next()
    assert reply.seq <= 16
    while reply.seq < 16:  # a slow machine may have let 50 ms pass
        reply = replies.next()
    assert reply.generate_step_ok.step == 1
    assert not reply.generate_step_ok.slots
    assert not reply.generate_step_ok.token_ids
    assert replies.sent.empty()


def test_other_ranks_answer_within_50_ms_without_another_plan(make_replies: Callable[[int], Replies]) -> None:
    """P11"""
    replies = make_replies(2)
    started = time.monotonic()
    replies.thread.step(outcome(7, (0, 50, 0)))
    assert replies.next().seq == 7
    assert 0.04 < time.monotonic() - started < 1.0


def test_a_late_acknowledgement_has_the_checksum_as_of_its_plan(make_replies: Callable[[int], Replies]) -> None:
    """P11: although steps of the next plan were done before it went out."""
    replies = make_replies(1)
    replies.thread.step(outcome(7, (0, 50, 0)))
    replies.thread.step(outcome(8, (0, 51, 0), last=False))
    assert replies.next().generate_step_ok.checksum == checksum((7, 0, 0, 50, 0))


def test_settling_is_answered_at_once_by_every_rank(make_replies: Callable[[int], Replies]) -> None:
    """P11"""
    for rank in (0, 1):
        replies = make_replies(rank)
        replies.thread.step(StepOutcome(seq=9, step=0, last=True, ack_now=True, started=time.perf_counter()))
        reply = replies.next()
        assert (reply.seq, reply.generate_step_ok.step, list(reply.generate_step_ok.slots)) == (9, 0, [])


def test_a_failure_comes_after_the_acknowledgement_of_what_was_done_before(
    make_replies: Callable[[int], Replies],
) -> None:
    """P11: else the plan before counts as outstanding for ever, and the drain after a fault waits for it."""
    replies = make_replies(1)
    replies.thread.step(outcome(1, (0, 5, 0)))
    replies.thread.response(pb.SessionResponse(epoch=EPOCH, seq=2, error=pb.Error(message="failed")))

    first, second = replies.next(), replies.next()
    assert (first.seq, first.HasField("generate_step_ok")) == (1, True)
    assert (second.seq, second.error.message) == (2, "failed")


def test_the_end_acknowledges_what_was_done(make_replies: Callable[[int], Replies]) -> None:
    """P11."""
    replies = make_replies(1)
    replies.thread.step(outcome(1, (0, 5, 0)))
    assert replies.thread.close(5.0)

    assert replies.next().seq == 1
    assert replies.sent.empty()


def test_replies_keep_the_order_of_submission(make_replies: Callable[[int], Replies]) -> None:
    """P1"""
    replies = make_replies(0)
    replies.thread.step(outcome(1, (0, 50, 0)))
    replies.thread.response(pb.SessionResponse(epoch=EPOCH, seq=2, unloaded=pb.Unloaded()))
    replies.thread.step(outcome(3, (0, 50, 0)))
    assert [replies.next().seq for _ in range(3)] == [1, 2, 3]


def test_a_step_whose_result_cannot_be_had_is_an_error_and_the_thread_lives_on(
    make_replies: Callable[[int], Replies],
) -> None:
    class Lost(HostCopy):
        def wait(self) -> np.ndarray:
            raise torch.AcceleratorError("device-side assert triggered")

    replies = make_replies(1)
    lost = Lost(torch.zeros(3, 1))
    replies.thread.step(StepOutcome(seq=1, step=0, last=True, ack_now=False, started=0.0, sampled=lost))
    reply = replies.next()
    assert (reply.seq, reply.error.kind) == (1, pb.ERROR_KIND_DEVICE_POISONED)
    replies.thread.step(outcome(2, (0, 50, 0), ack_now=True))
    assert replies.next().seq == 2


def test_log_probabilities_go_to_the_rows_that_ask(make_replies: Callable[[int], Replies]) -> None:
    sampled = SampledLogprobs(
        rows=(0, 2),
        counts=(2, 0),
        chosen=torch.tensor([-0.5, -0.25]),
        top_values=torch.tensor([[-0.5, -1.0], [-0.25, -2.0]]),
        top_ids=torch.tensor([[50, 7], [52, 8]]),
    )
    step = outcome(1, (3, 50, 0), (1, 51, 0), (0, 52, 0))
    with_logprobs = StepOutcome(
        seq=1,
        step=0,
        last=True,
        ack_now=False,
        started=step.started,
        slots=step.slots,
        sampled=step.sampled,
        logprobs=StepLogprobs.of(sampled),
    )
    replies = make_replies(0)
    replies.thread.step(with_logprobs)
    reply = replies.next().generate_step_ok
    assert list(reply.slots) == [0, 1, 3]
    assert reply.logprobs[0] == pb.TokenLogprobs(logprob=-0.25)
    assert reply.logprobs[1] == pb.TokenLogprobs()
    assert reply.logprobs[2] == pb.TokenLogprobs(logprob=-0.5, top_token_ids=[50, 7], top_logprobs=[-0.5, -1.0])
