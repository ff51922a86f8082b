"""What all judgements of one pass share: the time, the nodes, and the spec's patience."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from tpmodel_operator import clock
from tpmodel_operator.api import Recovery
from tpmodel_operator.observed import NodeRecord, Observed, PodRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """Of one pass."""

    now: datetime
    recovery: Recovery
    dead_node_toleration: int
    nodes: dict[str, NodeRecord]

    @classmethod
    def of(cls, observed: Observed) -> Circumstances:
        """Those of what was observed."""
        return cls(
            now=observed.now,
            recovery=observed.model.spec.recovery,
            dead_node_toleration=observed.model.spec.scheduling.dead_node_toleration,
            nodes=observed.nodes,
        )

    def node_given_up(self, pod: PodRecord) -> datetime | None:
        """When the toleration for the pod's node ends, if that node is not ready; None: it is ready, or unknown.

        A node that does not exist is left to Kubernetes, which removes its pods.
        """
        node = self.nodes.get(pod.node)
        if node is None or node.ready:
            return None
        return clock.later(node.ready_changed or self.now, self.dead_node_toleration)

    def on_dead_node(self, pod: PodRecord) -> bool:
        """Whether the pod is ending on a node that will confirm nothing any more."""
        given_up = self.node_given_up(pod)
        return pod.deleting_since is not None and given_up is not None and given_up <= self.now


def grace_end(pod: PodRecord) -> datetime | None:
    """When a terminating pod's grace period is over; None: it is not terminating."""
    return None if pod.deleting_since is None else clock.later(pod.deleting_since, pod.grace_seconds)
