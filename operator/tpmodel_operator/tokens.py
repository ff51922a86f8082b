"""The gangs' token Secrets, which the operator may create and nothing else: it cannot read, change or list them.

Whether one exists is asked with a dry run of its creation.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Set

from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel
from tpmodel_operator.children import of_gang, owned_by
from tpmodel_operator.kube import SECRETS, ApiError, Kube
from tpmodel_operator.observed import PodRecord, StatefulSetRecord
from tpmodel_operator.resources import secret

logger = logging.getLogger(__name__)

CHECK_SECONDS = 600.0
WAITING_CHECK_SECONDS = 30.0
"""While a pod of the gang does not run: a missing Secret would be the reason."""
LEFTOVER_SECONDS = 10.0
"""How long the Secret of an earlier gang of the same name may take to be collected."""


class Tokens:
    """Creates tokens, and notices that one is gone."""

    def __init__(self, kube: Kube, clock: Callable[[], float] = time.monotonic) -> None:
        self._kube = kube
        self._clock = clock
        self._checked: dict[str, float] = {}

    async def missing(
        self, model: TPModel, gangs: Iterable[StatefulSetRecord], pods: Iterable[PodRecord]
    ) -> frozenset[str]:
        """Gangs whose token is gone although a container may have read it. One that nobody read is made at once."""
        by_gang: dict[str, list[PodRecord]] = {}
        for pod in pods:
            by_gang.setdefault(pod.gang, []).append(pod)
        due = [gang for gang in gangs if not gang.deleting and self._is_due(gang, by_gang.get(gang.name, []))]
        gone = await asyncio.gather(*(self._is_gone(model, gang) for gang in due))
        lost: set[str] = set()
        for gang in (gang for gang, is_gone in zip(due, gone, strict=True) if is_gone):
            if any(pod.running or pod.ended for pod in by_gang.get(gang.name, [])):
                lost.add(gang.name)
                # Asked again at the next pass, should this one not come to making it.
                self._checked.pop(gang.uid, None)
            else:
                await self.create(model, of_gang(gang), gang.uid)
        return frozenset(lost)

    async def create(self, model: TPModel, gang: EnsureGang, uid: str, *, leftover: bool = False) -> None:
        """The gang whose StatefulSet has this UID has a token.

        Args:
            model: the gang's.
            gang: whose token.
            uid: of its StatefulSet.
            leftover: the StatefulSet is new, so a Secret that exists is an earlier one's and about to be collected.
        """
        patience = self._clock() + LEFTOVER_SECONDS
        while not await self._create(model, gang, uid, dry_run=False):
            if not leftover or self._clock() > patience:
                break
            await asyncio.sleep(0.5)
        self._checked[uid] = self._clock()

    def keep(self, uids: Set[str]) -> None:
        """Forgets all StatefulSets but these."""
        self._checked = {uid: at for uid, at in self._checked.items() if uid in uids}

    def _is_due(self, gang: StatefulSetRecord, pods: list[PodRecord]) -> bool:
        waiting = any(not pod.running for pod in pods)
        period = WAITING_CHECK_SECONDS if waiting else CHECK_SECONDS
        return self._clock() - self._checked.get(gang.uid, -float("inf")) > period

    async def _is_gone(self, model: TPModel, gang: StatefulSetRecord) -> bool:
        self._checked[gang.uid] = self._clock()
        return await self._create(model, of_gang(gang), gang.uid, dry_run=True)

    async def _create(self, model: TPModel, gang: EnsureGang, uid: str, *, dry_run: bool) -> bool:
        """Whether it did not exist."""
        body = owned_by(gang.name, uid, secret.build(model, gang, token=secrets.token_urlsafe(32)))
        try:
            await self._kube.create(SECRETS, model.namespace, body, dry_run=dry_run)
        except ApiError as error:
            if error.conflict:
                return False
            raise
        return True
