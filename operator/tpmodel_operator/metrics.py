"""What the operator counts and measures, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_SHORT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_LONG = (1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600)


class Metrics:
    """One registry with all of the operator's metrics."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tpmodel_operator_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"tpmodel_operator_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tpmodel_operator_{name}", text, labels, registry=self.registry, buckets=buckets)

        self.leader = gauge("leader", "1 while this process holds the Lease")
        self.models = gauge("models", "TPModels known to this process")
        self.reconcile_seconds = histogram("reconcile_seconds", "Duration of one pass over a TPModel", _SHORT, "result")
        self.queue_wait_seconds = histogram(
            "queue_wait_seconds", "From the first event of a TPModel to the beginning of its pass", _SHORT
        )
        self.queue_depth = gauge("queue_depth", "TPModels that wait for a pass")
        self.api_requests = counter(
            "api_requests", "Calls of the Kubernetes API; status 0: no answer", "verb", "status"
        )
        self.watch_restarts = counter("watch_restarts", "Fresh lists after a watch could not go on", "resource")
        self.differences = gauge("cache_differences", "Objects in which watches and fresh lists disagree")
        self.gang_restarts = counter("gang_restarts", "Coordinated restarts of gangs", "cause")
        self.time_to_ready = histogram("gang_ready_seconds", "From the making of a gang to its first Ready", _LONG)
        self.restart_reaction = histogram(
            "restart_reaction_seconds", "From a pod's event to the acceptance of the last delete it caused", _SHORT
        )
        self.restart_seconds = histogram("restart_seconds", "From the decision to restart a gang to Ready again", _LONG)

    def measure_queue(self, depth: Callable[[], float]) -> None:
        """The queue's depth is asked for whenever the metrics are read."""
        self.queue_depth.set_function(depth)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
