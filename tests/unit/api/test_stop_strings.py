"""The stop string automaton against a plain search."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tpmodel_worker.api.stop_strings import StopHit, StopMatcher, StopStrings

letters = st.text(alphabet="abc", max_size=12)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4)


def first_hit(stops: list[str], text: str) -> tuple[str, int] | None:
    """The stop string that is complete first, the longest of several, and where it ends."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return max(found, key=len), end
    return None


@given(stops=stop_lists, pieces=st.lists(letters, max_size=5))
@settings(max_examples=500)
def test_finds_what_a_plain_search_finds_however_the_text_is_cut(stops: list[str], pieces: list[str]) -> None:
    matcher = StopMatcher(StopStrings(stops))
    before, found = 0, None
    for piece in pieces:
        hit = matcher.feed(piece)
        if hit is not None:
            found = (hit.stop, before + hit.end)
            break
        before += len(piece)
    assert found == first_hit(stops, "".join(pieces))


@given(stops=stop_lists, text=letters)
@settings(max_examples=500)
def test_pending_is_the_longest_end_that_a_stop_string_begins_with(stops: list[str], text: str) -> None:
    matcher = StopMatcher(StopStrings(stops))
    if matcher.feed(text) is not None:
        return
    beginnings = {stop[:length] for stop in stops for length in range(len(stop))}
    assert matcher.pending == max(length for length in range(len(text) + 1) if text[len(text) - length :] in beginnings)


def test_the_first_to_be_complete_wins() -> None:
    assert StopMatcher(StopStrings(["abcd", "bc"])).feed("xabcd") == StopHit("bc", 4)


def test_the_longest_wins_where_several_are_complete_at_once() -> None:
    assert StopMatcher(StopStrings(["c", "abc", "bc"])).feed("abc") == StopHit("abc", 3)


def test_a_hit_counts_from_the_start_of_the_last_piece() -> None:
    matcher = StopMatcher(StopStrings(["stop"]))
    assert matcher.feed("..st") is None
    assert matcher.pending == 2
    assert matcher.feed("op..") == StopHit("stop", 2)
