"""Which request may be what ends one world after the other, and when it is failed for that.

A request has proved itself in a world once that has brought it a token of its prompt and one of its decoding, or its
end. One that was in a lost world without that is under suspicion, and after two such worlds in a row it is a suspect.
Suspects go into the next world before everybody else and one at a time: the next one follows when the one before has
proved itself. So the third world that is lost around a suspect was lost around no other, and that request is failed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tpmodel_worker.engine.sequence import RequestState
from tpmodel_worker.engine.sequence import Sequence as Sample

SUSPECTED_AFTER = 2
"""Worlds in a row that were lost around a request before it proved itself in them."""
BLAMED_AFTER = 3
PROVING_TOKENS = 2
"""One that a prompt's last step sampled, and one of decoding: either may be what a rank fails at."""


def note_token(sample: Sample) -> None:
    """A token of the sample was committed."""
    sample.tokens_in_world += 1
    if sample.tokens_in_world >= PROVING_TOKENS:
        sample.state.fruitless_worlds = 0


def note_lost_world(states: Iterable[RequestState]) -> list[RequestState]:
    """The world is lost, and its slots are as they were: those requests that are to be blamed for it."""
    blamed: list[RequestState] = []
    for state in states:
        tokens = max(sample.tokens_in_world for sample in state.samples)
        if state.samples_in_slots and tokens < PROVING_TOKENS:
            state.fruitless_worlds += 1
            if state.fruitless_worlds >= BLAMED_AFTER:
                blamed.append(state)
    return blamed


def is_suspect(state: RequestState) -> bool:
    """Whether no other suspect may run until this one has proved itself."""
    return state.fruitless_worlds >= SUSPECTED_AFTER


def on_trial(running: Iterable[Sample], waiting: Sequence[Sample]) -> RequestState | None:
    """The suspect of which samples may be admitted now, and of nobody else; None: there is no suspect."""
    for samples in (running, waiting):
        for sample in samples:
            if is_suspect(sample.state):
                return sample.state
    return None
