"""The world as those see it who interrupt it for a while: weight updates, handovers, and pods that drain."""

from __future__ import annotations

from typing import Protocol

from tpmodel_worker.engine.build import GangCache
from tpmodel_worker.engine.loop import ServingLoop
from tpmodel_worker.engine.pool import Pool


class ServedWorld(Protocol):
    """What is asked of the world."""

    @property
    def pool(self) -> Pool | None:
        """The ranks; None while there is no world."""
        ...

    @property
    def loop(self) -> ServingLoop | None:
        """Where requests are served; None before the first world."""
        ...

    @property
    def kv(self) -> GangCache | None:
        """What other gangs are told of its KV cache; None while there is no world."""
        ...
