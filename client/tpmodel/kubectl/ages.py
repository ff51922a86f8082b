"""Times of the API as people read them."""

from __future__ import annotations

from datetime import datetime

_UNITS = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def age(time: str, now: datetime) -> str:
    """How long ago, such as 5m; empty where there is no time."""
    return span((now - datetime.fromisoformat(time)).total_seconds()) if time else ""


def until(time: str, now: datetime) -> str:
    """How long from now; empty where it is over."""
    seconds = (datetime.fromisoformat(time) - now).total_seconds()
    return span(seconds) if seconds > 0 else ""


def span(seconds: float) -> str:
    """In the largest unit, with the next one while the number is small: 45s, 5m, 1h30m, 3d."""
    left = max(0, round(seconds))
    for place, (unit, size) in enumerate(_UNITS):
        number, rest = divmod(left, size)
        if number or size == 1:
            finer = rest // _UNITS[place + 1][1] if number < 3 and place + 1 < len(_UNITS) else 0
            return f"{number}{unit}" + (f"{finer}{_UNITS[place + 1][0]}" if finer else "")
    return "0s"
