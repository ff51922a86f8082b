"""Who is who in the process group of an update. No torch."""

from __future__ import annotations

TRAINER = 0
"""The trainer's rank in the update group."""

JOIN_STEP = 0
"""What a rank's status calls the joining; receiving and waiting have the numbers that the engine gives them."""


def update_rank(*, gang_index: int, world_size: int, rank: int, offset: int) -> int:
    """A rank's place in the update group, where all gangs have the same world size."""
    return gang_index * world_size + rank + offset
