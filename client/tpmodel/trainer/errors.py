"""What an update can fail with."""

from __future__ import annotations

from tpmodel.errors import TpmodelError


class WeightUpdateError(TpmodelError):
    """A gang refused a step of the update, or it failed; the message says what is served now and what to do."""


class UpdateOrderError(Exception):
    """A call of the trainer's own that the one before does not allow."""
