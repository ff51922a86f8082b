"""Carries decided actions out. Each may be repeated, and one that is out of date does nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from tpmodel_operator import gangs
from tpmodel_operator.actions import Action, DeleteGang, DeletePod, EnsureGang, EnsureModelChildren, WriteAttempt
from tpmodel_operator.api import TPModel
from tpmodel_operator.attempts import Attempts
from tpmodel_operator.children import of_gang, owned_by
from tpmodel_operator.kube import PODS, STATEFUL_SETS, ApiError, Kube
from tpmodel_operator.lasting import LastingChildren
from tpmodel_operator.observed import Observed, Orders, StatefulSetRecord
from tpmodel_operator.ownership import Ownership
from tpmodel_operator.resources import configmap, networkpolicy, statefulset
from tpmodel_operator.tokens import Tokens
from tpmodel_operator.waiting import all_of


class Applier:
    """The writing half of a pass."""

    def __init__(
        self,
        kube: Kube,
        *,
        attempts: Attempts,
        tokens: Tokens,
        lasting: LastingChildren,
        ownership: Ownership,
        permit: Callable[[], None],
    ) -> None:
        """permit: raises where this process must not write any more; asked before every action."""
        self._kube = kube
        self._attempts = attempts
        self._tokens = tokens
        self._lasting = lasting
        self._ownership = ownership
        self._permit = permit

    async def apply(self, observed: Observed, actions: Iterable[Action]) -> int:
        """All actions, in order; the first failure ends it. Returns how many pods' deletions were accepted."""
        deleted = 0
        for is_delete, group in itertools.groupby(actions, lambda action: isinstance(action, DeletePod)):
            if is_delete:
                # The pods of a gang end together: none waits for the delete of another.
                deleted += await self._delete_pods(observed, [a for a in group if isinstance(a, DeletePod)])
            else:
                for action in group:
                    await self._apply(observed, action)
        return deleted

    async def restore_tokens(self, observed: Observed) -> None:
        """Tokens that were lost are made again; called when the status says that those gangs restart."""
        lost = [record for record in observed.statefulsets if record.name in observed.tokens_missing]
        for record in lost:
            self._permit()
            await self._tokens.create(observed.model, of_gang(record), record.uid)

    async def _apply(self, observed: Observed, action: Action) -> None:
        self._permit()
        match action:
            case EnsureModelChildren():
                await self._lasting.ensure_shared(observed.model, action)
                await all_of(self._repair_gang(observed, record) for record in observed.statefulsets)
            case EnsureGang():
                await self._ensure_gang(observed, action)
            case WriteAttempt():
                await self._write_attempt(observed, action)
            case DeleteGang():
                await self._delete_gang(observed, action)
            case DeletePod():
                await self._delete_pods(observed, [action])

    async def _ensure_gang(self, observed: Observed, gang: EnsureGang) -> None:
        """The StatefulSet comes first, since it owns the others; its pods wait for what they mount."""
        model = observed.model
        body = statefulset.build(model, gang)
        try:
            uid = (await self._kube.create(STATEFUL_SETS, model.namespace, body))["metadata"]["uid"]
            is_new = True
        except ApiError as error:
            if not error.conflict:
                raise
            there = await self._kube.get(STATEFUL_SETS, model.namespace, gang.name)
            self._ownership.require_own(model, STATEFUL_SETS, there)
            uid, is_new = there["metadata"]["uid"], False
        await all_of([self._tokens.create(model, gang, uid, leftover=is_new), self._accompany(model, gang, uid)])

    async def _repair_gang(self, observed: Observed, record: StatefulSetRecord) -> None:
        """What a crash between two writes left out, or somebody deleted; tokens are looked after when observing."""
        if not record.deleting:
            remembered = (gang for gang in observed.model.status.gangs if gang.name == record.name)
            orders = observed.orders.get(record.name, Orders(attempt=1))
            if (gang := next(remembered, None)) is not None:
                orders = gangs.orders_of(gang).over(orders)
            await self._accompany(observed.model, of_gang(record, orders), record.uid)

    async def _accompany(self, model: TPModel, gang: EnsureGang, uid: str) -> None:
        """The gang's ConfigMap and NetworkPolicy exist."""
        policy = owned_by(gang.name, uid, networkpolicy.build_gang(model, gang))
        attempt = owned_by(gang.name, uid, configmap.build(model, gang))
        await all_of([self._attempts.ensure(model, attempt), self._lasting.ensure(model, policy)])

    async def _write_attempt(self, observed: Observed, action: WriteAttempt) -> None:
        record = _record(observed, action.gang)
        if record is not None:
            orders = Orders(
                attempt=action.attempt,
                rebuild=action.rebuild,
                model_revision=action.model_revision,
                weights_version=action.weights_version,
            )
            body = configmap.build(observed.model, of_gang(record, orders))
            await self._attempts.ensure(observed.model, owned_by(record.name, record.uid, body))

    async def _delete_gang(self, observed: Observed, action: DeleteGang) -> None:
        """Its other children go with the StatefulSet, which owns them."""
        await self._kube.discard(STATEFUL_SETS, observed.model.namespace, action.name, uid=action.uid)

    async def _delete_pods(self, observed: Observed, pods: list[DeletePod]) -> int:
        self._permit()
        namespace = observed.model.namespace
        return sum(
            await all_of(
                self._kube.discard(PODS, namespace, pod.name, uid=pod.uid, grace_seconds=pod.grace_seconds)
                for pod in pods
            )
        )


def _record(observed: Observed, gang: str) -> StatefulSetRecord | None:
    return next((record for record in observed.statefulsets if record.name == gang), None)
