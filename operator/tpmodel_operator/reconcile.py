"""One pass over one TPModel: observe, decide, write the status, act, tell. Only levels count, never the event that
brought the pass about."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import UTC, datetime

from tpmodel_operator import gang, status, weights
from tpmodel_operator.acceptance import Refusal
from tpmodel_operator.actions import Decision, Event
from tpmodel_operator.api import GROUP, KIND, VERSION, TPModel, TPModelStatus
from tpmodel_operator.apply import Applier
from tpmodel_operator.conditions import Situation
from tpmodel_operator.history import History
from tpmodel_operator.kube import MODELS, ApiError, Json, Kube
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.models import ModelStore, identity
from tpmodel_operator.observe import Observer
from tpmodel_operator.observed import Observed
from tpmodel_operator.ownership import NameTakenError
from tpmodel_operator.posting import EventPoster
from tpmodel_operator.queue import Key, Turn
from tpmodel_operator.records import UnreadableModelError
from tpmodel_operator.settings import OperatorSettings
from tpmodel_operator.tokens import WAITING_CHECK_SECONDS

logger = logging.getLogger(__name__)

NAMESPACE_ENDS_SECONDS = 10.0


class Reconciler:
    """Holds what passes need; has no state of its own."""

    def __init__(
        self,
        kube: Kube,
        *,
        models: ModelStore,
        observer: Observer,
        applier: Applier,
        events: EventPoster,
        settings: OperatorSettings,
        metrics: Metrics,
        permit: Callable[[], None],
    ) -> None:
        """permit: raises where this process must not write any more."""
        self._kube = kube
        self._models = models
        self._observer = observer
        self._applier = applier
        self._events = events
        self._settings = settings
        self._metrics = metrics
        self._history = History(metrics)
        self._permit = permit

    async def run_pass(self, turn: Turn) -> float | None:
        """The pass; returns in how many seconds the next one is due, None: only when something changes."""
        started = time.monotonic()
        self._metrics.queue_wait_seconds.observe(started - turn.queued)
        result = "error"
        try:
            due = await self._reconcile(turn)
            result = "ok"
        except ApiError as error:
            if not error.namespace_ends:
                raise
            due, result = NAMESPACE_ENDS_SECONDS, "namespace ends"
        finally:
            self._metrics.reconcile_seconds.labels(result).observe(time.monotonic() - started)
        return due

    async def _reconcile(self, turn: Turn) -> float | None:
        known = self._models.get(turn.key)
        if known is None or identity(known).deleting:
            return None  # its children go with it, being owned by it
        if isinstance(known, UnreadableModelError):
            return await self._refuse(known)
        observed = await self._observer.observe(known)
        decision = gang.decide(observed, self._settings)
        if not await self._write_status(known, decision.status):
            return 0.0
        await self._applier.restore_tokens(observed)
        try:
            deleted = await self._applier.apply(observed, decision.actions)
        except NameTakenError:
            return 0.0  # the next pass sees it, and tells the user
        if deleted and turn.event is not None:
            self._metrics.restart_reaction.observe(time.monotonic() - turn.event)
        self._history.learn(observed, decision.status)
        self._events.post(known, decision.events)
        return self._next_pass(observed, decision)

    async def _write_status(self, model: TPModel, wanted: TPModelStatus) -> bool:
        """Whether the pass may act: its status is written, or was already so. False: there is a newer TPModel."""
        if wanted == model.status:
            return True
        self._permit()
        try:
            answer = await self._kube.apply(MODELS, model.namespace, status_body(model, wanted), subresource="status")
        except ApiError as error:
            if not (error.conflict or error.not_found):
                raise
            await self._read_again(Key(model.namespace, model.name))
            return False
        self._models.wrote(answer)
        return True

    async def _read_again(self, key: Key) -> None:
        try:
            self._models.wrote(await self._kube.get(MODELS, key.namespace, key.name))
        except ApiError as error:
            if not error.not_found:
                raise
            # Deleted: the watch is about to say so.

    async def _refuse(self, unreadable: UnreadableModelError) -> float:
        """The spec holds what this operator does not know: nothing of it may be done, and the user is told."""
        model = unreadable.model
        refusal = Refusal(reason="SpecNotUnderstood", message=f"{unreadable}: use a newer operator, or change the spec")
        gangs = tuple(model.status.gangs)
        situation = Situation(
            wanted=len(gangs),
            revision=model.status.revision,
            gangs=gangs,
            image=model.status.image,
            model_revision=model.status.model_revision,
            rebuild_requested=model.status.rebuild_requested,
            weights=weights.remembered(model),
            refusal=refusal,
        )
        now = datetime.now(UTC)
        wanted = status.build(model, situation, [], now)
        if wanted != model.status and await self._write_status(model, wanted):
            self._events.post(model, [Event(type="Warning", reason=refusal.reason, message=refusal.message)])
        return self._resync()

    def _next_pass(self, observed: Observed, decision: Decision) -> float:
        due = [self._resync()]
        if decision.requeue_after is not None:
            due.append(decision.requeue_after)
        if any(not pod.running for pod in observed.pods):
            # What it waits for may be an object that no watch tells of.
            due.append(WAITING_CHECK_SECONDS)
        return min(due)

    def _resync(self) -> float:
        """Spread, so that not all models have their turn at once."""
        return self._settings.resync_seconds * random.uniform(0.8, 1.2)  # noqa: S311 - not for secrets


def status_body(model: TPModel, wanted: TPModelStatus) -> Json:
    """The status as server-side apply sends it. It names the version that was decided from: a process that was away
    for a while cannot put an old status back."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {
            "name": model.name,
            "namespace": model.namespace,
            "uid": model.uid,
            "resourceVersion": model.resource_version,
        },
        "status": wanted.model_dump(mode="json", by_alias=True, exclude_none=True),
    }
