"""What gangs' ConfigMaps tell their pods: read once, kept, and written so that numbers only rise."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass

from tpmodel_operator import names
from tpmodel_operator.api import TPModel
from tpmodel_operator.kube import CONFIG_MAPS, ApiError, Json, Kube
from tpmodel_operator.observed import Orders
from tpmodel_operator.ownership import Ownership
from tpmodel_operator.resources.configmap import data_of, orders_of

FRESH_SECONDS = 600
"""Only this program writes them; a hand that changed one is noticed after this long."""

Gang = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True, slots=True)
class Known:
    """A ConfigMap as last read or written."""

    orders: Orders
    owner: str
    """UID of the StatefulSet that it goes with."""
    version: str
    at: float
    labelled: bool
    """Whether it has this operator's labels: one of somebody else says nothing."""


class Attempts:
    """All that are known."""

    def __init__(self, kube: Kube, ownership: Ownership, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._ownership = ownership
        self._clock = clock
        self._known: dict[Gang, Known] = {}

    async def read(self, namespace: str, gang: str, *, fresh_seconds: float = FRESH_SECONDS) -> Orders | None:
        """What the gang's ConfigMap says, at most so many seconds old; None where there is none."""
        known = self._known.get((namespace, gang))
        if known is None or self._clock() - known.at > fresh_seconds:
            known = await self._read(namespace, gang)
        return known.orders if known and known.labelled else None

    async def ensure(self, model: TPModel, body: Json) -> None:
        """The gang's ConfigMap says at least what this one says; NameTakenError where somebody else has its name."""
        metadata = body["metadata"]
        gang = (metadata["namespace"], metadata["labels"][names.GANG_LABEL])
        wanted = orders_of(body["data"])
        known = self._known.get(gang)
        try:
            await self._raise(model, gang, body, wanted, known)
        except ApiError as error:
            if not (error.conflict or error.not_found):
                raise
            # It is not as it was when it was last seen: read again, once.
            await self._raise(model, gang, body, wanted, await self._read(*gang))

    def keep(self, gangs: Set[Gang]) -> None:
        """Forgets all others."""
        self._known = {gang: known for gang, known in self._known.items() if gang in gangs}

    async def _raise(self, model: TPModel, gang: Gang, body: Json, wanted: Orders, known: Known | None) -> None:
        if known is None:
            answer = await self._kube.create(CONFIG_MAPS, gang[0], body)
        elif not known.labelled:
            self._ownership.refuse(model, CONFIG_MAPS, body["metadata"]["name"])
        elif (orders := wanted.over(known.orders)) != known.orders or known.owner != _owner(body):
            # One of another owner is left over from an earlier gang of this name: adopted, or it would go with that.
            versioned = {"data": data_of(orders), "metadata": body["metadata"] | {"resourceVersion": known.version}}
            answer = await self._kube.apply(CONFIG_MAPS, gang[0], body | versioned)
        else:
            return
        self._known[gang] = self._learn(answer)

    async def _read(self, namespace: str, gang: str) -> Known | None:
        try:
            item = await self._kube.get(CONFIG_MAPS, namespace, names.attempt_config_map(gang))
        except ApiError as error:
            if not error.not_found:
                raise
            self._known.pop((namespace, gang), None)
            return None
        known = self._known[namespace, gang] = self._learn(item)
        return known

    def _learn(self, item: Json) -> Known:
        metadata = item["metadata"]
        labelled = metadata.get("labels", {}).get(names.MANAGED_BY) == names.MANAGED_BY_VALUE
        return Known(
            orders_of(item.get("data") or {}), _owner(item), metadata["resourceVersion"], self._clock(), labelled
        )


def _owner(item: Json) -> str:
    return next((owner["uid"] for owner in item["metadata"].get("ownerReferences", [])), "")
