"""The reading half of a pass: what the watches hold, and the few things that are asked for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Generic, TypeVar

from tpmodel_operator import defaults, records
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.attempts import FRESH_SECONDS, Attempts
from tpmodel_operator.kube import CLAIMS, NODES, ApiError, Kube
from tpmodel_operator.observed import GangReport, NodeRecord, Observed, Orders, PodRecord, StatefulSetRecord
from tpmodel_operator.ownership import Ownership
from tpmodel_operator.queue import Key
from tpmodel_operator.store import Store
from tpmodel_operator.tokens import WAITING_CHECK_SECONDS, Tokens
from tpmodel_operator.waiting import all_of

NODE_FRESH_SECONDS = 2.0
"""A node that fails takes many pods: one look serves all their models."""
CLAIM_FRESH_SECONDS = 600.0
"""A claim's access modes never change; one that is missing is looked for at every pass."""

V = TypeVar("V")


class Remembered(Generic[V]):
    """Answers of the API that are good for a while."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._answers: dict[tuple[str, str], tuple[V, float]] = {}

    def get(self, name: tuple[str, str]) -> V | None:
        """The answer, if it is good still."""
        answer, at = self._answers.get(name, (None, 0.0))
        return answer if answer is not None and self._clock() - at < self._seconds else None

    def put(self, name: tuple[str, str], answer: V) -> None:
        """Keeps an answer; those that are too old go."""
        now = self._clock()
        self._answers = {key: kept for key, kept in self._answers.items() if now - kept[1] < self._seconds}
        self._answers[name] = (answer, now)


class Observer:
    """Puts together what one pass decides from."""

    def __init__(
        self,
        kube: Kube,
        *,
        pods: Store[PodRecord],
        stateful_sets: Store[StatefulSetRecord],
        attempts: Attempts,
        tokens: Tokens,
        ownership: Ownership,
        reports: Callable[[Key], Mapping[str, GangReport]],
        largest_node: Callable[[TPModelSpec], int | None],
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._kube = kube
        self._pods = pods
        self._stateful_sets = stateful_sets
        self._attempts = attempts
        self._tokens = tokens
        self._ownership = ownership
        self._reports = reports
        self._largest_node = largest_node
        self._now = now
        self._nodes: Remembered[NodeRecord] = Remembered(NODE_FRESH_SECONDS)
        self._claims: Remembered[tuple[str, ...]] = Remembered(CLAIM_FRESH_SECONDS)

    async def observe(self, model: TPModel) -> Observed:
        """Everything about one TPModel, as of now."""
        key = Key(model.namespace, model.name)
        pods = self._pods.of(key)
        stateful_sets = self._stateful_sets.of(key)
        nodes, orders, volumes, missing, conflicts = await asyncio.gather(
            self._read_nodes(pod.node for pod in pods if pod.deleting_since and pod.node),
            self._read_orders(stateful_sets, pods),
            self._read_claims(model),
            self._tokens.missing(model, stateful_sets, pods),
            self._ownership.conflicts(model),
        )
        return Observed(
            model=model,
            now=self._now(),
            # As they were when the rest was asked for; what changed meanwhile brings a pass of its own.
            statefulsets=stateful_sets,
            pods=pods,
            nodes=nodes,
            orders=orders,
            reports=dict(self._reports(key)),
            volumes=volumes,
            tokens_missing=missing,
            largest_node=self._largest_node(model.spec),
            conflicts=conflicts,
        )

    async def _read_nodes(self, names: Iterable[str]) -> dict[str, NodeRecord]:
        found = await all_of(self._read_node(name) for name in sorted(set(names)))
        return {node.name: node for node in found if node is not None}

    async def _read_node(self, name: str) -> NodeRecord | None:
        if (known := self._nodes.get(("", name))) is not None:
            return known
        try:
            node = records.node(await self._kube.get(NODES, None, name))
        except ApiError as error:
            # Where nodes are not for this operator to read, all of them count as alive.
            if error.not_found or error.forbidden:
                return None
            raise
        self._nodes.put(("", name), node)
        return node

    async def _read_orders(
        self, stateful_sets: tuple[StatefulSetRecord, ...], pods: tuple[PodRecord, ...]
    ) -> dict[str, Orders]:
        waiting = {pod.gang for pod in pods if not pod.running}
        found = await all_of(
            self._attempts.read(
                record.namespace,
                record.name,
                # A pod that does not run may wait for a ConfigMap that somebody deleted.
                fresh_seconds=WAITING_CHECK_SECONDS if record.name in waiting else FRESH_SECONDS,
            )
            for record in stateful_sets
        )
        pairs = zip(stateful_sets, found, strict=True)
        return {record.name: orders for record, orders in pairs if orders is not None}

    async def _read_claims(self, model: TPModel) -> dict[str, tuple[str, ...]]:
        try:
            names = defaults.claims(model.spec)
        except ValueError:
            return {}  # the uri is none; acceptance says so
        found = await all_of(self._read_claim(model.namespace, name) for name in names)
        return {name: modes for name, modes in zip(names, found, strict=True) if modes is not None}

    async def _read_claim(self, namespace: str, name: str) -> tuple[str, ...] | None:
        if (known := self._claims.get((namespace, name))) is not None:
            return known
        try:
            item = await self._kube.get(CLAIMS, namespace, name)
        except ApiError as error:
            if error.not_found:
                return None
            raise
        modes = tuple(item["spec"].get("accessModes", ()))
        self._claims.put((namespace, name), modes)
        return modes
