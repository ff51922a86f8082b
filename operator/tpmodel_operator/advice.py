"""Advice about what would work better, where the cluster shows it. Nothing is decided by it."""

from __future__ import annotations

from tpmodel_operator import defaults
from tpmodel_operator.api import TPModelSpec


def about_nodes(spec: TPModelSpec, largest_node: int | None) -> str:
    """What to write where no node could ever hold one pod; empty: nothing is to be said.

    Args:
        spec: the model's.
        largest_node: GPUs of the largest node that may be used; None or 0: nothing is known, since a pool that is
            scaled to zero has no nodes either.
    """
    needed = defaults.ranks_per_pod(spec)
    if not largest_node or needed <= largest_node:
        return ""
    size = spec.tensor_parallel_size
    fitting = max(ranks for ranks in range(1, largest_node + 1) if size % ranks == 0)
    chosen = " that scheduling.nodeSelector chooses" if spec.scheduling.node_selector else ""
    return (
        f"a pod needs {needed} {defaults.gpu_resource(spec)}, but no node{chosen} offers more than {largest_node}: "
        f"write ranksPerPod: {fitting}, or add nodes with {needed} GPUs"
    )
