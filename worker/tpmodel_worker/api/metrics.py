"""What the api processes count. Values of all processes of a pod meet in files under settings.metrics_dir."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from tpmodel.v1 import pod_pb2

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

# Seconds. From one step of a small model to a stall that somebody should look at.
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 10)
_WAIT_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CANCELLED = "CANCELLED"
_MULTIPROCESS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"


def use_metrics_dir(path: Path) -> None:
    """Makes prometheus_client share its values through path; call before anything imports it."""
    path.mkdir(parents=True, exist_ok=True)
    os.environ[_MULTIPROCESS_VARIABLE] = str(path)


def render_all(path: Path) -> bytes:
    """The metrics of all processes that share path, in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(path))
    return generate_latest(registry)


class ApiMetrics:
    """The histograms and counters of this process."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """registry: for tests; None: the process's own."""
        # prometheus_client decides at import whether values are shared, so main() sets that up first.
        from prometheus_client import REGISTRY, Counter, Histogram

        from tpmodel_worker.api.batched_histogram import BatchedHistogram

        registry = registry or REGISTRY
        self.time_to_first_token = Histogram(
            "tpmodel_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.inter_token = BatchedHistogram(
            "tpmodel_inter_token_seconds",
            "Between two tokens of a sample.",
            buckets=_TOKEN_BUCKETS,
            registry=registry,
        )
        self.request = Histogram(
            "tpmodel_request_seconds",
            "From a request's arrival to its end.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.request_queue = Histogram(
            "tpmodel_request_queue_seconds",
            "From a request's arrival to its admission.",
            buckets=_WAIT_BUCKETS,
            registry=registry,
        )
        self.requests = Counter(
            "tpmodel_requests",
            "Requests that ended, by gRPC status code and protocol.",
            ["code", "protocol"],
            registry=registry,
        )

    @contextmanager
    def count_request(self, protocol: str) -> Iterator[RequestOutcome]:
        """Counts one request; what is left in the outcome at the end is its status code."""
        outcome = RequestOutcome()
        start = monotonic()
        try:
            yield outcome
        except Exception:
            if outcome.code == CANCELLED:
                outcome.code = "INTERNAL"
            raise
        finally:
            self.inter_token.flush()
            self.request.observe(monotonic() - start)
            self.requests.labels(outcome.code, protocol).inc()


@dataclass(slots=True)
class RequestOutcome:
    """How a request ended; one that nobody brings to an end was cancelled."""

    code: str = CANCELLED


@dataclass(slots=True)
class TokenTimes:
    """Measures one request's tokens as they arrive from the engine, however fast the client reads."""

    metrics: ApiMetrics
    start: float = field(default_factory=monotonic)
    _last: dict[int, float] = field(default_factory=dict)

    def observe(self, output: pod_pb2.Output) -> None:
        """Takes one output. Tokens that arrive together share the time since the ones before."""
        now = monotonic()
        if output.HasField("admitted"):
            self.metrics.request_queue.observe(now - self.start)
        count = len(output.token_ids)
        if not count:
            return
        last = self._last.get(output.sample_index)
        if last is not None:
            self.metrics.inter_token.observe_many((now - last) / count, count, now)
        elif not self._last:
            self.metrics.time_to_first_token.observe(now - self.start)
        self._last[output.sample_index] = now
