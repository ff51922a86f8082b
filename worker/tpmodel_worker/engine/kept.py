"""Requests that have ended here and are to go on at another gang: what each holds, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Kept:
    """The KV cache of one request, until it is fetched or expires."""

    ticket: str
    token_ids: list[int]
    """Prompt and outputs."""
    tokens: int
    """How many of them have KV: all but the last."""
    blocks: list[int]
    slot: int
    """Where the recurrent state is; -1: the model has none, and the slot is free."""
    expires: float
    """Unix seconds."""
    fetching: bool = False
    """Ranks read it: it stays, whatever the time, until they are done."""


class KeptRequests:
    """By ticket, in the order in which they were kept. Which blocks are free is not decided here."""

    def __init__(self) -> None:
        self._by_ticket: dict[str, Kept] = {}

    def __len__(self) -> int:
        return len(self._by_ticket)

    def add(self, kept: Kept) -> None:
        """Takes one in."""
        self._by_ticket[kept.ticket] = kept

    def find(self, ticket: str) -> Kept | None:
        """None: nothing is kept under this ticket, or not any more."""
        return self._by_ticket.get(ticket)

    def remove(self, kept: Kept) -> None:
        """Forgets one."""
        del self._by_ticket[kept.ticket]

    def oldest(self) -> Kept | None:
        """The first that nobody is fetching."""
        return next((kept for kept in self._by_ticket.values() if not kept.fetching), None)

    def expired(self, now: float) -> list[Kept]:
        """Those whose time is over, and that nobody is fetching."""
        return [kept for kept in self._by_ticket.values() if kept.expires <= now and not kept.fetching]

    def next_expiry(self) -> float | None:
        """Unix seconds; None: nothing expires by itself."""
        return min((kept.expires for kept in self._by_ticket.values() if not kept.fetching), default=None)
