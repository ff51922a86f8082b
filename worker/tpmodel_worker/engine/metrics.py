"""What the engine counts and measures for /metrics; names start with tpmodel_."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from tpmodel.v1 import worker_pb2

_STEP_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
_PLAN_BUCKETS = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05)
_FAULT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 30.0, 60.0, 120.0)
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
        self.persisted_version = gauge(
            "tpmodel_persisted_weight_version", "Newest version of the weights that all ranks have in files."
        )
        self.persist_failures = Counter(
            "tpmodel_weight_persist_failures",
            "Versions of the weights that could not be kept in files.",
            registry=registry,
        )
        self.weight_update_phase_seconds = Histogram(
            "tpmodel_weight_update_phase_seconds",
            "Parts of the time of a weight update: pause, begin, check, prepare_receiving, receive, trainer (between "
            "its calls), digest, commit, confirm, clear; and first_step, to the first token of the new weights.",
            ["phase"],
            registry=registry,
            buckets=_FAULT_BUCKETS,
        )
        self.weight_copies = Counter(
            "tpmodel_weight_copies",
            "Copies of the weights between gangs, by direction and outcome.",
            ["direction", "outcome"],
            registry=registry,
        )
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
        self.detection_seconds = Histogram(
            "tpmodel_fault_detection_seconds",
            "From the last sign of life of a world that was at work to the detection of its fault.",
            ["kind"],
            registry=registry,
            buckets=_FAULT_BUCKETS,
        )
        self.rebuild_seconds = Histogram(
            "tpmodel_rebuild_seconds",
            "From the detection of a fault to the end of the replay.",
            registry=registry,
            buckets=_FAULT_BUCKETS,
        )
        self.rebuild_phase_seconds = Histogram(
            "tpmodel_rebuild_phase_seconds",
            "Parts of the time of a rebuild: abort, respawn, init, check, map, clear, first_step, replay.",
            ["phase"],
            registry=registry,
            buckets=_FAULT_BUCKETS,
        )
        self.rebuilds = Counter(
            "tpmodel_rebuilds", "Rebuilds of the world, by outcome.", ["outcome"], registry=registry
        )
        self.replayed_requests = Counter(
            "tpmodel_replayed_requests", "Requests that a rebuilt world computed again.", registry=registry
        )
        self.blamed_requests = Counter(
            "tpmodel_blamed_requests",
            "Requests failed since worlds were lost while they computed them.",
            registry=registry,
        )
        self.step_seconds = Histogram(
            "tpmodel_step_seconds", "Time of one step on rank 0.", registry=registry, buckets=_STEP_BUCKETS
        )
        self.plan_seconds = Histogram(
            "tpmodel_plan_seconds", "The engine's CPU time to make a plan.", registry=registry, buckets=_PLAN_BUCKETS
        )
        self.plan_bytes = Histogram(
            "tpmodel_plan_bytes", "Size of a plan as sent to each rank.", registry=registry, buckets=_BYTES_BUCKETS
        )

    def observe_rebuild(self, rebuild: worker_pb2.Rebuild) -> None:
        """Counts a rebuild that led to a world."""
        self.rebuilds.labels("rebuilt").inc()
        self.rebuild_seconds.observe(rebuild.seconds)
        for phase in rebuild.phases:
            self.rebuild_phase_seconds.labels(phase.name).observe(phase.seconds)
        self.replayed_requests.inc(rebuild.replayed_requests)
