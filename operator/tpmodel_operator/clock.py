"""Moments as Kubernetes writes them: RFC 3339 in UTC, whole seconds."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

SECOND = timedelta(seconds=1)


def text(moment: datetime) -> str:
    """Rounded up: a wait that is read back never ends early."""
    whole = moment.astimezone(UTC)
    if whole.microsecond:
        whole = whole.replace(microsecond=0) + SECOND
    return whole.strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(written: str) -> datetime | None:
    """What text() wrote; None for an empty text."""
    return datetime.fromisoformat(written) if written else None


def later(start: datetime, seconds: float) -> datetime:
    """So many seconds after."""
    return start + timedelta(seconds=seconds)
