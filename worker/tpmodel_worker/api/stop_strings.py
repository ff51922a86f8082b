"""Finds stop strings in text that arrives in pieces.

The result does not depend on how the text is cut into pieces: the stop string that is complete first wins, and
of several that are complete at the same character the longest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopHit:
    """A stop string that is complete."""

    stop: str
    end: int
    """Where it ends, in characters from the start of the piece last fed."""


class StopStrings:
    """An Aho-Corasick automaton over a request's stop strings; shared by the request's samples.

    A state is a node of the trie of all stop strings, namely the longest of their beginnings that the text so
    far ends with.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """stops: at least one, none of them empty."""
        self.next: list[dict[str, int]] = [{}]
        self.depth: list[int] = [0]
        """How many characters at the text's end could be a stop string's beginning, by state."""
        self.found: list[str] = [""]
        """The longest stop string that the text ends with, by state."""
        for stop in stops:
            self._insert(stop)
        self.fallback: list[int] = [0] * len(self.next)
        """The state of the text without its first character, by state."""
        self._link()

    def _insert(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self.next[state].get(character)
            if following is None:
                following = len(self.next)
                self.next[state][character] = following
                self.next.append({})
                self.depth.append(self.depth[state] + 1)
                self.found.append("")
            state = following
        self.found[state] = stop

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self.next[state].items():
                self.fallback[following] = self.step(self.fallback[state], character)
                self.found[following] = self.found[following] or self.found[self.fallback[following]]
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while state and character not in self.next[state]:
            state = self.fallback[state]
        return self.next[state].get(character, 0)


class StopMatcher:
    """Where one sample's text stands in the automaton."""

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._state = 0

    @property
    def pending(self) -> int:
        """Characters at the end of the text that a stop string may begin with."""
        return self._stops.depth[self._state]

    def feed(self, text: str) -> StopHit | None:
        """Reads the next piece up to the first complete stop string."""
        stops, state = self._stops, self._state
        for position, character in enumerate(text):
            state = stops.step(state, character)
            if stops.found[state]:
                self._state = state
                return StopHit(stops.found[state], position + 1)
        self._state = state
        return None
