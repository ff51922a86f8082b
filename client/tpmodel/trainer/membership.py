"""The gangs that a trainer updates: those that there are at the moment."""

from __future__ import annotations

import time

import torch

from tpmodel.trainer.discovery import Targets
from tpmodel.trainer.errors import WeightUpdateError
from tpmodel.trainer.gang import Gang
from tpmodel.trainer.options import UpdateOptions

_LOOK_AGAIN_SECONDS = 0.5
_MAY_PASS = ("UNAVAILABLE", "DEADLINE_EXCEEDED")


class Membership:
    """Holds a connection to each gang, of which it is known what its model is made of."""

    def __init__(self, targets: Targets, token: str, options: UpdateOptions) -> None:
        """Finds nobody yet."""
        self._targets = targets
        self._token = token
        self._options = options
        self.gangs: list[Gang] = []

    @property
    def changing(self) -> bool:
        """Whether gangs may come and go."""
        return self._targets.changing

    def find(self, *, anew: bool) -> None:
        """The gangs are those that there are now; all of them answer.

        A gang of a name may be about to come or to go: addresses are looked up again until all of them answer.

        Args:
            anew: those that are known are asked again what their model is made of.

        Raises:
            WeightUpdateError: a gang does not answer in time, or refuses.
            ValueError: the gangs are not alike.
        """
        kept = {} if anew else {gang.target: gang for gang in self.gangs}
        deadline = time.monotonic() + self._options.join_seconds
        while True:
            targets = self._targets.now()
            kept = {target: gang for target, gang in kept.items() if target in targets}
            for gang in self.gangs:
                if gang not in kept.values():
                    gang.close()
            self.gangs = [kept.get(target) or Gang(target, self._token) for target in targets]
            try:
                for gang in self.gangs:
                    if gang.target in kept:
                        gang.version()
                    else:
                        gang.describe()
                    kept[gang.target] = gang
                break
            except WeightUpdateError as error:
                if error.code not in _MAY_PASS or not self.changing or time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_AGAIN_SECONDS)
        self._check_alike()

    def served(self) -> dict[str, int | None]:
        """By control port, what each gang serves; None: nothing, or it does not answer."""
        served: dict[str, int | None] = {}
        for gang in self.gangs:
            try:
                served[gang.target] = gang.version()
            except WeightUpdateError:
                served[gang.target] = None
        return served

    def close(self) -> None:
        """Closes the connections. Idempotent."""
        for gang in self.gangs:
            gang.close()

    def _check_alike(self) -> None:
        first = self.gangs[0]
        kind = torch.device(self._options.device).type
        for gang in self.gangs:
            if gang.device != kind and self._options.backend != "gloo":
                raise ValueError(f"gang {gang.target} is on {gang.device}, the trainer's device is {kind}")
            if (gang.world_size, gang.parameters) != (first.world_size, first.parameters):
                raise ValueError(f"gangs {first.target} and {gang.target} have other models or world sizes")
