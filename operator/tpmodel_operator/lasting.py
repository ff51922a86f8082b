"""Children that are kept as wanted: applied when they are due, which is new, changed, or not confirmed for long."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Set

from tpmodel_operator import names
from tpmodel_operator.actions import EnsureModelChildren
from tpmodel_operator.api import TPModel
from tpmodel_operator.kube import (
    DISRUPTION_BUDGETS,
    NETWORK_POLICIES,
    SERVICE_ACCOUNTS,
    SERVICES,
    ApiError,
    Json,
    Kube,
    Resource,
)
from tpmodel_operator.ownership import is_own
from tpmodel_operator.resources import model_children
from tpmodel_operator.settings import OperatorSettings
from tpmodel_operator.waiting import all_of

REPAIR_SECONDS = 1800.0
"""What somebody else changed or deleted is put right after this long at the latest."""

NONE_WANTED = "none"
"""In place of a digest: there is to be no such object."""

_RESOURCES = {kind.kind: kind for kind in (SERVICE_ACCOUNTS, SERVICES, NETWORK_POLICIES, DISRUPTION_BUDGETS)}

Child = tuple[str, str]
"""Kind and name."""


class LastingChildren:
    """Remembers what was applied, so that a pass sends only what is due."""

    def __init__(self, kube: Kube, settings: OperatorSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._settings = settings
        self._clock = clock
        self._applied: dict[str, dict[Child, tuple[str, float]]] = {}

    async def ensure_shared(self, model: TPModel, wanted: EnsureModelChildren) -> None:
        """Those of the model, which all its gangs share."""
        children = model_children(model, wanted, self._settings)
        calls = [self.ensure(model, child) for child in children]
        if wanted.disruptable_pods is None:
            calls.append(self._remove(model, DISRUPTION_BUDGETS, model.name))
        trainers = names.trainers_service(model.name)
        if model.spec.auth.trainer_token is None and self._was_made(model, (SERVICES.kind, trainers)):
            calls.append(self._remove(model, SERVICES, trainers))
        await all_of(calls)

    async def ensure(self, model: TPModel, body: Json) -> None:
        """One child is as wanted."""
        resource = _RESOURCES[body["kind"]]
        child = (body["kind"], body["metadata"]["name"])
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        if self._is_due(model, child, digest):
            await self._kube.apply(resource, model.namespace, body)
            self._note(model, child, digest)

    def keep(self, uids: Set[str]) -> None:
        """Forgets all TPModels but these."""
        self._applied = {uid: children for uid, children in self._applied.items() if uid in uids}

    async def _remove(self, model: TPModel, resource: Resource, name: str) -> None:
        child = (resource.kind, name)
        if self._is_due(model, child, NONE_WANTED):
            # Without a status nothing has been made for the model yet.
            if model.status.observed_generation:
                await self._remove_own(model, resource, name)
            self._note(model, child, NONE_WANTED)

    async def _remove_own(self, model: TPModel, resource: Resource, name: str) -> None:
        try:
            item = await self._kube.get(resource, model.namespace, name)
        except ApiError as error:
            if not error.not_found:
                raise
            return
        if is_own(item, model):
            await self._kube.discard(resource, model.namespace, name, uid=item["metadata"]["uid"])

    def _was_made(self, model: TPModel, child: Child) -> bool:
        """Whether this process has made it, or status says that one before has: else nothing needs to be asked."""
        applied, _ = self._applied.get(model.uid, {}).get(child, ("", 0.0))
        return bool(model.status.trainers_url) or applied not in ("", NONE_WANTED)

    def _is_due(self, model: TPModel, child: Child, digest: str) -> bool:
        applied, at = self._applied.get(model.uid, {}).get(child, ("", 0.0))
        return applied != digest or self._clock() - at > REPAIR_SECONDS

    def _note(self, model: TPModel, child: Child, digest: str) -> None:
        self._applied.setdefault(model.uid, {})[child] = (digest, self._clock())
