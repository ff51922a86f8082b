"""Requests on their way between this gang and another: what is kept here, and what comes from there."""

from __future__ import annotations

from tpmodel_worker.engine.kept import Kept
from tpmodel_worker.engine.placement import Placement
from tpmodel_worker.engine.requests import Fetch
from tpmodel_worker.engine.sequence import Sequence


class Handovers:
    """Of one world: with its placement all of it is gone."""

    def __init__(self, placement: Placement, *, weight_version: int) -> None:
        self._placement = placement
        self._weight_version = weight_version
        self._begun: list[Fetch] = []
        self._dropped: list[Fetch] = []
        self._receiving: dict[Fetch, Sequence] = {}
        self._fetches: dict[Sequence, Fetch] = {}

    # ----------------------------------------------------------------------------------- kept here

    def find(self, ticket: str) -> Kept | None:
        """What is kept under a ticket; None: nothing, or nothing any more."""
        return self._placement.kept.find(ticket)

    def begin(self, kept: Kept) -> None:
        """Ranks read it from now on, so that it stays as it is until `end`."""
        kept.fetching = True

    def end(self, kept: Kept, now: float, *, fetched: bool) -> float | None:
        """Nobody reads it any more. Where it was not fetched it stays; unix seconds until when, None: it is gone."""
        if self._placement.kept.find(kept.ticket) is not kept:
            return None  # the world was lost, and its blocks with it
        kept.fetching = False
        if fetched or kept.expires <= now:
            self._placement.drop(kept)
            return None
        return kept.expires

    # ---------------------------------------------------------------------------- comes from there

    def begin_fetch(self, sequence: Sequence) -> None:
        """A sequence has got blocks, into which its KV is to come."""
        assert sequence.source is not None, "only what has a source is received"
        request = sequence.state.request
        fetch = Fetch(
            key=request.key,
            request_id=request.request_id,
            source=sequence.source,
            token_ids=tuple(sequence.token_ids),
            blocks=tuple(sequence.blocks),
            slot=sequence.slot,
            weight_version=self._weight_version,
        )
        self._receiving[fetch] = sequence
        self._fetches[sequence] = fetch
        self._begun.append(fetch)

    def request_ended(self, sequence: Sequence) -> None:
        """Nobody wants its KV any more; what it holds stays held until the fetch is over."""
        if sequence in self._fetches:
            self._dropped.append(self._fetches[sequence])

    def take_begun(self) -> list[Fetch]:
        """New ones: each holds its blocks until end_fetch."""
        begun, self._begun = self._begun, []
        return begun

    def take_dropped(self) -> list[Fetch]:
        """Those whose request has ended since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def end_fetch(self, fetch: Fetch) -> Sequence | None:
        """The sequence that it was for; None: it was of a world that is gone."""
        sequence = self._receiving.pop(fetch, None)
        if sequence is not None:
            del self._fetches[sequence]
        return sequence
