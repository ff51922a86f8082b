"""How ranks are laid out over pods: pure functions of the spec. Nodes are never asked, a pool may have none yet."""

from __future__ import annotations

from tpmodel_operator.api import TPModelSpec

MOST_RANKS_OF_A_POD = 8
"""GPUs of one host that NVLink joins, on the machines that are common."""

DEFAULT_GPU_RESOURCE = "nvidia.com/gpu"


def default_ranks_per_pod(spec: TPModelSpec) -> int:
    """On cuda the largest divisor of tensorParallelSize that fits a host; on cpu 1."""
    if spec.device == "cpu":
        return 1
    size = spec.tensor_parallel_size
    return max(count for count in range(1, MOST_RANKS_OF_A_POD + 1) if size % count == 0)


def ranks_per_pod(spec: TPModelSpec) -> int:
    """Ranks, and GPUs, of one pod."""
    return spec.ranks_per_pod or default_ranks_per_pod(spec)


def pods_per_gang(spec: TPModelSpec) -> int:
    """Pods of one gang."""
    return spec.tensor_parallel_size // ranks_per_pod(spec)


def gpu_resource(spec: TPModelSpec) -> str:
    """The extended resource that pods ask GPUs by; empty: they ask by claims, or need none."""
    if spec.device == "cpu" or spec.resource_claims:
        return ""
    return spec.gpu_resource_name or DEFAULT_GPU_RESOURCE
