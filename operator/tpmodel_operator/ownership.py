"""Objects under the names that a TPModel's children have: its own, or somebody else's, which are left alone.

Server-side apply would take a foreign object over in silence, and the TPModel's end would then delete it. So each
child is looked at before it is first written, and again before it is repaired.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from typing import NoReturn

from tpmodel_operator import names
from tpmodel_operator.api import KIND, TPModel
from tpmodel_operator.kube import (
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    SERVICE_ACCOUNTS,
    SERVICES,
    STATEFUL_SETS,
    ApiError,
    Json,
    Kube,
    Resource,
)
from tpmodel_operator.waiting import all_of

CHECK_SECONDS = 1200.0
"""Less than the time after which children are repaired: a repair never meets what has not been looked at."""

_OWNERS = (KIND, STATEFUL_SETS.kind)
"""Kinds that own children of this operator's making."""

Child = tuple[Resource, str]
"""What kind, and its name."""


class NameTakenError(Exception):
    """An object of a child's name belongs to somebody else; the next pass shows it."""


class Ownership:
    """Remembers which children were found to be the TPModel's own, or absent, and which were not."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._looked: dict[str, dict[Child, float]] = {}
        self._foreign: dict[str, set[Child]] = {}

    async def conflicts(self, model: TPModel) -> tuple[str, ...]:
        """Foreign objects under the names of the TPModel's children, such as "Service chat"; those that were found
        before are looked at again."""
        foreign = self._foreign.get(model.uid, set())
        due = [child for child in {*_shared(model), *foreign} if child in foreign or self._is_due(model, child)]
        await all_of(self._look(model, child) for child in due)
        return tuple(sorted(f"{resource.kind} {name}" for resource, name in self._foreign.get(model.uid, ())))

    def require_own(self, model: TPModel, resource: Resource, item: Json) -> None:
        """Raises NameTakenError where an object that was in the way is not the TPModel's, and remembers it."""
        if not is_own(item, model):
            self.refuse(model, resource, item["metadata"]["name"])

    def refuse(self, model: TPModel, resource: Resource, name: str) -> NoReturn:
        """Remembers a foreign object, and raises NameTakenError."""
        self._foreign.setdefault(model.uid, set()).add((resource, name))
        raise NameTakenError(f"{resource.kind} {model.namespace}/{name} belongs to somebody else")

    def keep(self, uids: Set[str]) -> None:
        """Forgets all TPModels but these."""
        self._looked = {uid: looked for uid, looked in self._looked.items() if uid in uids}
        self._foreign = {uid: foreign for uid, foreign in self._foreign.items() if uid in uids}

    def _is_due(self, model: TPModel, child: Child) -> bool:
        looked = self._looked.get(model.uid, {}).get(child)
        return looked is None or self._clock() - looked > CHECK_SECONDS

    async def _look(self, model: TPModel, child: Child) -> None:
        resource, name = child
        try:
            foreign = not is_own(await self._kube.get(resource, model.namespace, name), model)
        except ApiError as error:
            if not error.not_found:
                raise
            foreign = False
        self._looked.setdefault(model.uid, {})[child] = self._clock()
        known = self._foreign.setdefault(model.uid, set())
        if foreign:
            known.add(child)
        else:
            known.discard(child)


def is_own(item: Json, model: TPModel) -> bool:
    """Whether the TPModel owns the object, or an earlier TPModel of its name did, whose children may be taken up."""
    metadata = item["metadata"]
    owners = metadata.get("ownerReferences", [])
    if any(owner["uid"] == model.uid for owner in owners):
        return True
    labels = metadata.get("labels", {})
    is_labelled = all(labels.get(key) == value for key, value in names.model_labels(model.name).items())
    return is_labelled and not any(owner.get("controller") and owner["kind"] not in _OWNERS for owner in owners)


def _shared(model: TPModel) -> Iterator[Child]:
    """The children that all gangs share; gangs' own have names with a hash, which nobody has by chance."""
    yield SERVICE_ACCOUNTS, model.name
    yield NETWORK_POLICIES, model.name
    for service in (names.client_service, names.leaders_service, names.pods_service):
        yield SERVICES, service(model.name)
    if model.spec.auth.trainer_token is not None:
        yield SERVICES, names.trainers_service(model.name)
    if model.spec.replicas > 1:
        yield DISRUPTION_BUDGETS, model.name
