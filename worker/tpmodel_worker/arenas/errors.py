"""What can go wrong with a rank's planned memory."""

from __future__ import annotations


class ArenaError(Exception):
    """An arena could not be made, mapped, stored or fetched."""


class ArenaMemoryError(ArenaError):
    """There is not enough memory for an arena."""

    def __init__(self, what: str, *, needed_bytes: int, free_bytes: int) -> None:
        super().__init__(f"{what} needs {needed_bytes} bytes, {free_bytes} are free")
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class ArenaSizeError(ArenaError):
    """The memory behind a descriptor is smaller than its manifest says, or could still shrink."""


class ArenaLinkError(ArenaError):
    """The supervisor does not answer, or refused."""
