"""Times as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tpmodel.kubectl.ages import age, span, until

NOW = datetime(2026, 1, 1, 0, 1, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59, "59s"), (60, "1m"), (90, "1m30s"), (200, "3m"), (5400, "1h30m"), (86_400 * 9, "9d"), (-5, "0s")],
)
def test_the_largest_unit_and_the_next_while_the_number_is_small(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_ages_count_from_times_of_the_api() -> None:
    assert age("2026-01-01T00:00:00Z", NOW) == "1m"
    assert age("", NOW) == ""


def test_what_is_over_is_not_waited_for() -> None:
    assert until("2026-01-01T00:01:20Z", NOW) == "20s"
    assert until("2026-01-01T00:00:59Z", NOW) == ""
