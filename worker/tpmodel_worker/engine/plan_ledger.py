"""Plans that were made and whose last reply has not come."""

from __future__ import annotations

from dataclasses import dataclass

from tpmodel_worker.engine.requests import ProtocolError
from tpmodel_worker.engine.sequence import Sequence


@dataclass(slots=True, eq=False)
class PlanRecord:
    """What rank 0's replies to one plan are read with."""

    number: int
    """Counts plans over all epochs."""
    steps: int
    sampling: dict[int, Sequence]
    """Who samples in every step, by slot, as of this plan: later plans may give the slot away."""
    decodes_only: bool
    expected_replies: int = 0
    """Sequences of `sampling` that had not finished before the next step; filled in with the first reply."""
    next_step: int = 0


class PlanLedger:
    """The outstanding plans, oldest first."""

    def __init__(self) -> None:
        self._plans: dict[int, PlanRecord] = {}
        self._number = 0
        self.last_done = 0
        """Number of the newest plan that is not outstanding any more: all up to it are done."""

    def __len__(self) -> int:
        return len(self._plans)

    @property
    def next_number(self) -> int:
        """The number that the next plan takes."""
        return self._number + 1

    def add(self, seq: int, plan: PlanRecord) -> None:
        """Notes a plan that is sent as seq."""
        if seq in self._plans:
            raise ValueError(f"plan {seq} is outstanding already")
        self._number = plan.number
        self._plans[seq] = plan

    def advance(self, seq: int, step: int) -> PlanRecord:
        """The plan that a reply belongs to. Its last step's reply takes it off the ledger.

        Raises ProtocolError unless the reply is the oldest plan's next one.
        """
        oldest = next(iter(self._plans), None)
        if oldest != seq:
            raise ProtocolError(f"reply to plan {seq}, but the oldest outstanding plan is {oldest}")
        plan = self._plans[seq]
        if step != plan.next_step:
            raise ProtocolError(f"plan {seq}: reply for step {step}, expected step {plan.next_step}")
        if step == 0:
            plan.expected_replies = sum(not sequence.finished for sequence in plan.sampling.values())
        plan.next_step += 1
        if plan.next_step >= plan.steps:
            del self._plans[seq]
            self.last_done = plan.number
        return plan

    def forget(self) -> None:
        """No reply will come for any plan: the epoch is over."""
        self._plans.clear()
        self.last_done = self._number
