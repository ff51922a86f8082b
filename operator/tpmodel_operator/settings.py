"""What the operator's command line decides; the same for every TPModel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSettings:
    """Settings of one operator process."""

    default_image: str
    """The worker's image for TPModels that name none; resolved once per rollout."""
    namespace: str = "default"
    """Where the operator itself runs, and its Lease is."""
    pod_name: str = "tpmodel-operator"
    """The identity under which the Lease is held; unique among the operator's pods."""
    allowed_host_paths: tuple[str, ...] = ()
    """Prefixes under which a TPModel may name a hostPath; none by default."""
    watch_namespaces: tuple[str, ...] = ()
    """Empty: all namespaces."""
    monitoring_namespaces: tuple[str, ...] = ()
    """Namespaces beside the operator's own that may reach the pods' metrics and health ports."""
    health_port: int = 8080
    metrics_port: int = 8081
    resync_seconds: float = 600.0
    """Every TPModel gets a pass at least this often, and the watches are compared with fresh lists."""
    workers: int = 16
    """Passes that may be under way at once."""
