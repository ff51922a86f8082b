"""The histogram that collects observations before it hands them on."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from tpmodel_worker.api.batched_histogram import FLUSH_SECONDS, BatchedHistogram

BUCKETS = (0.01, 0.1, 1.0)


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    return {
        (sample.name, sample.labels.get("le", "")): sample.value
        for metric in registry.collect()
        for sample in metric.samples
        if not sample.name.endswith("_created")
    }


def test_after_a_flush_it_shows_what_a_plain_histogram_shows() -> None:
    """Also for amounts at a bucket's border and beyond the last one."""
    plain_registry, registry = CollectorRegistry(), CollectorRegistry()
    plain = Histogram("gap", "Gap.", buckets=BUCKETS, registry=plain_registry)
    batched = BatchedHistogram("gap", "Gap.", buckets=BUCKETS, registry=registry)
    for amount, count in ((0.0, 1), (0.01, 2), (0.011, 1), (0.5, 3), (1.0, 1), (7.0, 2)):
        batched.observe_many(amount, count, 0.0)
        for _ in range(count):
            plain.observe(amount)
    batched.flush()
    batched.flush()
    assert samples(registry) == samples(plain_registry)


def test_what_is_observed_shows_by_itself_before_long() -> None:
    registry = CollectorRegistry()
    batched = BatchedHistogram("gap", "Gap.", buckets=BUCKETS, registry=registry)
    batched.observe_many(0.05, 1, 100.0)
    assert samples(registry)["gap_count", ""] == 1, "the first one flushes"
    batched.observe_many(0.05, 1, 100.0 + FLUSH_SECONDS / 2)
    assert samples(registry)["gap_count", ""] == 1
    batched.observe_many(0.05, 1, 100.0 + 2 * FLUSH_SECONDS)
    assert samples(registry)["gap_count", ""] == 3
