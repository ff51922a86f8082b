"""The book of the plans that are under way on the ranks: who has done what, and by when it is due."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from tpmodel.v1 import worker_pb2
from tpmodel_worker.engine.errors import ChecksumError, ProtocolError

MAX_OUTSTANDING = 2
"""Plans sent and not yet answered by rank 0."""
MAX_LAG = 16
"""Plans that another rank's acknowledgement may be behind rank 0's."""
_MEAN_FACTOR = 20
_MEAN_WEIGHT = 0.1

PlanSize = tuple[int, int]


def plan_size(plan: worker_pb2.GenerateStepRequest) -> PlanSize:
    """What plans must share for their durations to be comparable: steps, and tokens up to a power of two."""
    tokens = len(plan.decode_slots) + sum(chunk.length for chunk in plan.prefill_chunks)
    return plan.steps, tokens.bit_length()


class PlanTimes:
    """Running means of how long plans of each size take; outlives an epoch."""

    def __init__(self, least: float) -> None:
        """least: seconds that every plan may take, whatever the mean says."""
        self.least = least
        self._means: dict[PlanSize, float] = {}

    def record(self, size: PlanSize, seconds: float) -> None:
        """Takes one plan's duration in."""
        mean = self._means.get(size, seconds)
        self._means[size] = mean + _MEAN_WEIGHT * (seconds - mean)

    def allowance(self, size: PlanSize) -> float:
        """Seconds after which a plan of this size counts as hung."""
        return max(self.least, _MEAN_FACTOR * self._means.get(size, 0.0))


@dataclass(slots=True)
class _Plan:
    seq: int
    steps: int
    size: PlanSize
    next_step: int = 0


class PlanWindow:
    """Plans of one epoch between their sending and the last rank's acknowledgement.

    Times are seconds of one monotonic clock, given by the caller.
    """

    def __init__(self, world_size: int, times: PlanTimes) -> None:
        self._times = times
        self._outstanding: deque[_Plan] = deque()
        self._head_since = 0.0
        self._last_sent = 0
        self._completed = 0
        self._acked = dict.fromkeys(range(1, world_size), 0)
        self._behind_since: dict[int, float] = {}
        # Of rank 0, for every completed plan that another rank has not acknowledged yet.
        self._checksums: dict[int, int] = {}
        # Of other ranks that are ahead of what rank 0 is known to have done.
        self._early: dict[int, tuple[int, int]] = {}
        self._extended_until = 0.0

    @property
    def may_send(self) -> bool:
        """False while two plans are outstanding, or a rank's acknowledgements are too far behind."""
        return len(self._outstanding) < MAX_OUTSTANDING and self._completed - self._least_acked() <= MAX_LAG

    @property
    def least_deadline(self) -> float:
        """Seconds that every plan has."""
        return self._times.least

    @property
    def settled(self) -> bool:
        """True when every rank has acknowledged everything sent."""
        return not self._outstanding and self._least_acked() >= self._last_sent

    def passed(self, seq: int) -> None:
        """Every rank has answered the control request of this seq; needs a settled window."""
        self._last_sent = self._completed = seq
        self._acked = dict.fromkeys(self._acked, seq)
        self._checksums.clear()

    def sent(self, seq: int, plan: worker_pb2.GenerateStepRequest, now: float) -> None:
        """A plan has gone to every rank."""
        if not self._outstanding:
            self._head_since = now
        self._outstanding.append(_Plan(seq, plan.steps, plan_size(plan)))
        self._last_sent = seq

    def answered(self, seq: int, reply: worker_pb2.GenerateStepOk, now: float) -> bool:
        """Rank 0 has done a step; True when it was the last of its plan.

        Raises ProtocolError for an answer out of order, ChecksumError where another rank differs.
        """
        if not self._outstanding or self._outstanding[0].seq != seq or self._outstanding[0].next_step != reply.step:
            due = f"plan {head.seq}, step {head.next_step}" if (head := self._head()) else "no plan"
            raise ProtocolError(f"rank 0 answered plan {seq}, step {reply.step}, when {due} was due")
        plan = self._outstanding[0]
        plan.next_step += 1
        if plan.next_step < plan.steps:
            return False
        self._outstanding.popleft()
        if plan.steps:
            self._times.record(plan.size, now - self._head_since)
        self._head_since = now
        self._completed = seq
        if self._acked:
            self._checksums[seq] = reply.checksum
            self._compare_early(seq)
        for rank, acked in self._acked.items():
            if acked < seq:
                self._behind_since.setdefault(rank, now)
        return True

    def acknowledged(self, rank: int, seq: int, reply: worker_pb2.GenerateStepOk, now: float) -> None:
        """Another rank than 0 has done every plan up to seq.

        Raises ProtocolError for tokens or an answer out of order, ChecksumError where it differs from rank 0.
        """
        if reply.slots or reply.token_ids or reply.logprobs:
            raise ProtocolError(f"rank {rank} sent tokens of plan {seq}; only rank 0 may")
        if not self._acked[rank] <= seq <= self._last_sent:
            raise ProtocolError(
                f"rank {rank} acknowledged plan {seq} after {self._acked[rank]}; the last one sent is {self._last_sent}"
            )
        self._acked[rank] = seq
        if seq in self._checksums:
            _compare(seq, self._checksums[seq], rank, reply.checksum)
        elif seq > self._completed:
            self._early[rank] = (seq, reply.checksum)
        if seq >= self._completed:
            self._behind_since.pop(rank, None)
        else:
            self._behind_since[rank] = now
        least = self._least_acked()
        for done in [known for known in self._checksums if known < least]:
            del self._checksums[done]

    def due(self) -> float | None:
        """When the ranks count as hung; None while nothing is under way."""
        times = [since + self._times.least for since in self._behind_since.values()]
        if self._outstanding:
            times.append(self._head_since + self._times.allowance(self._outstanding[0].size))
        return max(min(times), self._extended_until) if times else None

    def silence(self, now: float) -> float:
        """Seconds that the oldest plan has been under way; 0 while none is."""
        return now - self._head_since if self._outstanding else 0.0

    def extend(self, until: float) -> None:
        """A rank has a reason to be slow: nothing is due before `until`."""
        self._extended_until = max(self._extended_until, until)

    def overdue(self) -> tuple[int, list[int]]:
        """The oldest plan that is not done everywhere, and the ranks that have not done it."""
        head = self._head()
        least = self._least_acked()
        seq = min(least + 1, head.seq) if head else least + 1
        ranks = [0] if head and head.seq <= seq else []
        return seq, ranks + [rank for rank, acked in self._acked.items() if acked < seq]

    def _head(self) -> _Plan | None:
        return self._outstanding[0] if self._outstanding else None

    def _least_acked(self) -> int:
        return min(self._acked.values(), default=self._completed)

    def _compare_early(self, seq: int) -> None:
        for rank, (early_seq, checksum) in list(self._early.items()):
            if early_seq == seq:
                _compare(seq, self._checksums[seq], rank, checksum)
            if early_seq <= seq:
                del self._early[rank]


def _compare(seq: int, expected: int, rank: int, checksum: int) -> None:
    if checksum != expected:
        raise ChecksumError(
            f"after plan {seq} rank 0 has checksum {expected:#010x} and rank {rank} has {checksum:#010x}: "
            "the ranks have computed different tokens"
        )
