"""What the engine counts and measures for /metrics; names start with tpmodel_."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STEP_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_PLAN_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_BYTES_BUCKETS = (32, 64, 128, 256, 512, 1024, 4096, 16384, 65536, 262144, 1048576)


class EngineMetrics:
    """The engine's metrics.

    With PROMETHEUS_MULTIPROC_DIR set before prometheus_client is imported they are written to files of
    that folder, where the process that serves /metrics reads them.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, registry=registry, multiprocess_mode="mostrecent")

        self.requests_running = gauge("tpmodel_requests_running", "Requests of which a sequence holds a slot.")
        self.requests_waiting = gauge("tpmodel_requests_waiting", "Requests that wait for a slot.")
        self.kv_cache_usage = gauge("tpmodel_kv_cache_usage_ratio", "Share of KV blocks that sequences hold.")
        self.epoch = gauge("tpmodel_epoch", "Number of the present world.")
        self.prefix_queries = Counter(
            "tpmodel_prefix_cache_queries", "Tokens looked up in the prefix cache.", registry=registry
        )
        self.prefix_hits = Counter("tpmodel_prefix_cache_hits", "Tokens found in the prefix cache.", registry=registry)
        self.generated_tokens = Counter("tpmodel_generated_tokens", "Tokens committed.", registry=registry)
        self.prompt_tokens = Counter("tpmodel_prompt_tokens", "Tokens of accepted prompts.", registry=registry)
        self.preemptions = Counter(
            "tpmodel_preemptions", "Sequences that lost their blocks and were computed again.", registry=registry
        )
        self.faults = Counter("tpmodel_faults", "Faults of the world.", ["kind"], registry=registry)
        self.step_seconds = Histogram(
            "tpmodel_step_seconds", "Time of one step on rank 0.", registry=registry, buckets=_STEP_BUCKETS
        )
        self.plan_seconds = Histogram(
            "tpmodel_plan_seconds", "The engine's CPU time to make a plan.", registry=registry, buckets=_PLAN_BUCKETS
        )
        self.plan_bytes = Histogram(
            "tpmodel_plan_bytes", "Size of a plan as sent to each rank.", registry=registry, buckets=_BYTES_BUCKETS
        )
