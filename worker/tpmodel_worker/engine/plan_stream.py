"""The plans of one epoch on their way: numbered, sent ahead of their replies, and rank 0's replies until taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.plans import PlanTimes, PlanWindow


class PlanStream:
    """What has been sent, what was answered, and whoever waits for either."""

    def __init__(self, world_size: int, times: PlanTimes, *, epoch: int, wake: Callable[[], None]) -> None:
        """wake: called with every reply."""
        self.window = PlanWindow(world_size, times)
        self.next_seq = 1
        """Of the next request, whichever it is."""
        self.news = asyncio.Event()
        """Set whenever plans, replies or faults change something; every waiter looks for itself."""
        self._epoch = epoch
        self._wake = wake
        self._settling_seq = 0
        self._replies: deque[tuple[int, worker_pb2.GenerateStepOk]] = deque()

    def take_seq(self) -> int:
        """The number of a request that is sent now."""
        seq = self.next_seq
        self.next_seq += 1
        return seq

    def begin(self, plan: worker_pb2.GenerateStepRequest) -> bytes:
        """Numbers a plan and notes that it is under way; the request that goes to every rank."""
        seq = self.take_seq()
        request = worker_pb2.SessionRequest(epoch=self._epoch, seq=seq, generate_step=plan).SerializeToString()
        self.window.sent(seq, plan, time.monotonic())
        self.news.set()
        return request

    def settling_plan(self) -> worker_pb2.GenerateStepRequest:
        """The next plan to send: it computes nothing, every rank answers it, and its reply concerns nobody else."""
        self._settling_seq = self.next_seq
        return worker_pb2.GenerateStepRequest(steps=0, ack_now=True)

    def answered(self, rank: int, seq: int, reply: worker_pb2.GenerateStepOk) -> None:
        """A rank has done a step. Raises ChecksumError or ProtocolError, as PlanWindow does."""
        if rank != 0:
            self.window.acknowledged(rank, seq, reply, time.monotonic())
            return
        self.window.answered(seq, reply, time.monotonic())
        if seq != self._settling_seq:
            self._replies.append((seq, reply))

    def take_replies(self) -> list[tuple[int, worker_pb2.GenerateStepOk]]:
        """Rank 0's replies since the last call, with their seq, in order."""
        replies = list(self._replies)
        self._replies.clear()
        return replies

    def notify(self) -> None:
        """Something has changed, for whoever waits here and for the serving loop."""
        self.news.set()
        self._wake()
