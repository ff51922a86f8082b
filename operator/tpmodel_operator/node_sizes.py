"""How many GPUs the largest nodes offer: for advice only, never to choose a value.

Nodes are many and large: they are listed in small pages, once a period and while a TPModel asks for GPUs at all, and
nothing is kept but the highest number per resource and per set of those labels that nodeSelectors name.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import NoReturn

from tpmodel_operator import defaults
from tpmodel_operator.api import TPModel, TPModelSpec
from tpmodel_operator.kube import NODES, ApiError, Json, Kube
from tpmodel_operator.queue import Key

logger = logging.getLogger(__name__)

PAGE = 50
LEAST_PAUSE_SECONDS = 20.0
"""Between two lists, also when a new TPModel asks for what the last one did not look at."""

Sizes = Mapping[tuple[frozenset[tuple[str, str]], str], int]
"""By labels and resource: what the largest such node offers."""


class NodeSizes:
    """What the last list of nodes has said."""

    def __init__(
        self,
        kube: Kube,
        *,
        models: Callable[[], Iterable[TPModel]],
        changed: Callable[[Key], None],
        period: float,
    ) -> None:
        """Args:
        kube: the API server; it may refuse nodes to this operator, then nothing is known.
        models: all that there are.
        changed: called with each TPModel that asks for GPUs, when the answer may have changed.
        period: seconds between two lists.
        """
        self._kube = kube
        self._models = models
        self._changed = changed
        self._period = period
        self._sizes: Sizes | None = None
        self._labels: frozenset[str] = frozenset()
        self._resources: frozenset[str] = frozenset()
        self._asked = asyncio.Event()
        self._is_refused = False

    def largest(self, spec: TPModelSpec) -> int | None:
        """The most GPUs of one node among those that the spec's nodeSelector chooses; None: none is known."""
        resource = defaults.gpu_resource(spec)
        selector = spec.scheduling.node_selector
        if not resource:
            return None
        if self._sizes is None or resource not in self._resources or not selector.keys() <= self._labels:
            self._asked.set()
            return None
        wanted = set(selector.items())
        return max(
            (count for (labels, of), count in self._sizes.items() if of == resource and wanted <= labels), default=0
        )

    async def run(self) -> NoReturn:
        """Lists each period, and when something is asked for that the last list did not look at, for ever."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), self._period)
            self._asked.clear()
            await self.look()
            await asyncio.sleep(LEAST_PAUSE_SECONDS if not self._is_refused else self._period)

    async def look(self) -> None:
        """One list; without a TPModel that asks for GPUs there is none."""
        asking = [model for model in self._models() if defaults.gpu_resource(model.spec)]
        if not asking:
            return
        labels = frozenset(name for model in asking for name in model.spec.scheduling.node_selector)
        resources = frozenset(defaults.gpu_resource(model.spec) for model in asking)
        try:
            sizes = await self._list(labels, resources)
        except ApiError as error:
            if not self._is_refused:
                logger.info("nodes cannot be listed, so there is no advice about their sizes: %s", error)
            self._is_refused = error.status == 403
            return
        self._is_refused = False
        before, self._sizes = self._sizes, sizes
        is_wider = not (labels <= self._labels and resources <= self._resources)
        self._labels, self._resources = labels, resources
        if sizes != before or is_wider:
            for model in asking:
                self._changed(Key(model.namespace, model.name))

    async def _list(self, labels: frozenset[str], resources: frozenset[str]) -> Sizes:
        sizes: dict[tuple[frozenset[tuple[str, str]], str], int] = {}
        async for page in self._kube.list(NODES, None, page=PAGE):
            for node in page.items:
                chosen = frozenset((key, value) for key, value in _labels(node).items() if key in labels)
                for resource, count in _offered(node, resources):
                    sizes[chosen, resource] = max(count, sizes.get((chosen, resource), 0))
        return sizes


def _labels(node: Json) -> dict[str, str]:
    return node["metadata"].get("labels", {})


def _offered(node: Json, resources: frozenset[str]) -> Iterable[tuple[str, int]]:
    allocatable = node.get("status", {}).get("allocatable", {})
    for resource in resources:
        text = str(allocatable.get(resource, "0"))
        if text.isdecimal() and int(text) > 0:
            yield resource, int(text)
