"""The live requests: from when they are taken to their end, and what clients are to be told of them meanwhile."""

from __future__ import annotations

from collections.abc import Hashable

from tpmodel_worker.engine.handovers import Handovers
from tpmodel_worker.engine.placement import Placement
from tpmodel_worker.engine.requests import (
    DEADLINE_EXCEEDED,
    UNAVAILABLE,
    Admitted,
    SequenceOutput,
)
from tpmodel_worker.engine.sequence import RequestState, Sequence, SequenceStatus
from tpmodel_worker.engine.suspects import is_suspect

RETRY_AFTER_SECONDS = 5.0
"""The hint to whoever waited for a rebuild in vain."""


class LiveRequests:
    """Every request that has not ended, when it gives up, and the outputs that are due.

    Whatever ends a request or a sample goes through here: what it holds is given back, and its key is free, at once.
    Times are unix seconds.
    """

    def __init__(self, placement: Placement, handovers: Handovers) -> None:
        """placement and handovers: of the present world."""
        self.placement = placement
        self.never_admitted = 0
        """Requests that wait for their first slot."""
        self.patience: float | None = None
        """Between two worlds: seconds that a request without a deadline of its own waits."""
        self.next_deadline: float | None = None
        """Before it nothing expires; None: nothing does."""
        self._handovers = handovers
        self._by_key: dict[Hashable, RequestState] = {}
        self._outputs: list[SequenceOutput] = []

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._by_key

    def states(self) -> list[RequestState]:
        """In the order in which they came. A copy."""
        return list(self._by_key.values())

    def add(self, state: RequestState, now: float) -> None:
        """Takes a request in: its samples go into the queue."""
        self._by_key[state.request.key] = state
        self.never_admitted += 1
        for sample in state.samples:
            self.placement.enqueue(sample)
        if self.patience is not None:
            state.held_until = now + self.patience
        self.note_deadline(_deadline_of(state))

    def cancel(self, key: Hashable, sample_index: int | None) -> bool:
        """Ends a request, or one sample of it (absolute index), without output. False: it was not live."""
        state = self._by_key.get(key)
        if state is None:
            return False
        if sample_index is None:
            self._end(state)
            return True
        for sample in state.samples:
            if sample.sample_index == sample_index and sample.status is not SequenceStatus.ENDED:
                self.end_sample(sample)
                return True
        return False

    # --------------------------------------------------------------------------------- outputs

    def tell(self, output: SequenceOutput) -> None:
        """Adds to what is due."""
        self._outputs.append(output)

    def tell_admitted(self, sequence: Sequence, *, cached_tokens: int, weight_version: int) -> None:
        """The request got its first slot, or goes on with other weights."""
        admitted = Admitted(cached_tokens=cached_tokens, weight_version=weight_version)
        self.tell(SequenceOutput(sequence.state.request.key, sequence.sample_index, admitted=admitted))

    def take_outputs(self) -> list[SequenceOutput]:
        """What is due, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # ------------------------------------------------------------------------------------ ends

    def fail(self, state: RequestState, code: int, message: str, *, retry_after: float = 0.0) -> None:
        """Ends a request with an error. code: google.rpc.Code."""
        self._end(state)
        first = state.samples[0].sample_index
        self.tell(SequenceOutput(state.request.key, first, error=(code, message), retry_after=retry_after))

    def end_sample(self, sample: Sequence) -> None:
        """Takes a live sample out of wherever it is; with the last one its request ends."""
        self.placement.end(sample)
        self._handovers.request_ended(sample)
        self.forget_ended(sample.state)

    def forget_ended(self, state: RequestState) -> None:
        """A sample of the request has ended: its last one?"""
        if state.live_samples == 0:
            del self._by_key[state.request.key]
            self.never_admitted -= not state.admitted

    def _end(self, state: RequestState) -> None:
        for sample in state.samples:
            if sample.status is not SequenceStatus.ENDED:
                self.end_sample(sample)

    # ------------------------------------------------------------------------------- deadlines

    def note_deadline(self, deadline: float | None) -> None:
        """Something expires then; None: it never does."""
        if deadline is not None and (self.next_deadline is None or deadline < self.next_deadline):
            self.next_deadline = deadline

    def expire(self, now: float) -> None:
        """Gives back what was kept too long, and fails the requests whose time is over."""
        if self.next_deadline is None or now < self.next_deadline:
            return
        self.next_deadline = None
        for kept in self.placement.kept.expired(now):
            self.placement.drop(kept)
        self.note_deadline(self.placement.kept.next_expiry())
        for state in self.states():
            deadline = _deadline_of(state)
            if deadline is None or deadline > now:
                self.note_deadline(deadline)
            elif self.patience is None:
                self.fail(state, DEADLINE_EXCEEDED, "the request's deadline has passed")
            else:
                message = "the gang is rebuilding its world, and the request's time to wait for that is over"
                self.fail(state, UNAVAILABLE, message, retry_after=RETRY_AFTER_SECONDS)

    # ------------------------------------------------------------------------------ other worlds

    def requeue(self, placement: Placement, handovers: Handovers) -> None:
        """The world is gone: everybody waits in the queue of another one, which is empty."""
        self.placement, self._handovers = placement, handovers
        for state in self._by_key.values():
            state.samples_in_slots = 0
            for sample in state.samples:
                if sample.status is not SequenceStatus.ENDED:
                    sample.forget_world()
                    placement.enqueue(sample)
        placement.trials = any(is_suspect(state) for state in self._by_key.values())

    def hold_until(self, held_until: float | None) -> None:
        """Until when requests without a deadline of their own wait for a world; None: there is one."""
        self.next_deadline = None
        for state in self._by_key.values():
            state.held_until = held_until
            self.note_deadline(_deadline_of(state))


def _deadline_of(state: RequestState) -> float | None:
    """Its own, else the one that a rebuild gave it."""
    return state.request.deadline if state.request.deadline is not None else state.held_until
