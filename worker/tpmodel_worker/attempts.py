"""Attempts: which of a gang's sets of pods somebody belongs to, and how those of an older set are recognised.

The operator raises a gang's attempt before it deletes a pod, and every process of a pod keeps the one that it was
started with. A pod that should be gone may still run (its node does not answer), so deletion fences nothing: whoever
is spoken to from a lower attempt refuses, and whoever hears of a higher one ends.
"""

from __future__ import annotations

METADATA = "tpmodel-attempt"
"""Call metadata: the attempt of the engine that calls or, trailing, that refuses a registration; decimal."""
MODEL_PATH_METADATA = "tpmodel-model-path"
"""Trailing metadata of a refused registration: the checkpoint folder that the engine serves."""
STALE = "stale attempt: "
"""How the cause begins when a pod ends since its gang is at a higher attempt; the operator counts no fault then."""

_EPOCH_BITS = 32


def epoch_floor(attempt: int) -> int:
    """The epochs of an attempt are above this number, those of lower attempts are not."""
    return attempt << _EPOCH_BITS


def attempt_of(epoch: int) -> int:
    """Which attempt an epoch belongs to."""
    return epoch >> _EPOCH_BITS


def read_attempt(text: str | bytes | None) -> int | None:
    """An attempt as metadata carries it; None for anything else."""
    decoded = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
    return int(decoded) if decoded.isascii() and decoded.isdigit() else None
