"""What an update can fail with."""

from __future__ import annotations

from collections.abc import Mapping

from tpmodel.errors import TpmodelError


class WeightUpdateError(TpmodelError):
    """A gang refused a step of the update, or it failed; the message says what is served now and what to do."""


class GangsDifferError(WeightUpdateError):
    """An update of several gangs failed, and not all serve the same now.

    Attributes:
        version: the version that was being sent. Sending it again goes on with the gangs that do not serve it.
        served: by control port, what each gang serves: a version, or None where it serves nothing or does not answer.
    """

    def __init__(self, error: WeightUpdateError, version: int, served: Mapping[str, int | None]) -> None:
        gangs = "; ".join(f"{target} serves {_said(found)}" for target, found in served.items())
        super().__init__(
            error.code, f"{error.message}. {gangs}. Send version {version} again to go on: who serves it is left out"
        )
        self.version = version
        self.served = dict(served)


class UpdateOrderError(Exception):
    """A call of the trainer's own that the one before does not allow."""


def _said(version: int | None) -> str:
    return "nothing" if version is None else f"version {version}"
