"""How many pods evictions may take, so that no more gangs are disturbed than the budget says.

One evicted pod costs its whole gang. So a budget of one gang is one pod, not a gang's worth of them: with two, two
evictions at the same moment could hit two gangs. A gang that has lost a pod restarts all of its pods, which uses up
the budget until it is Ready again; its other pods, not Ready, may be evicted meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable

from tpmodel_operator.api import TPModelSpec
from tpmodel_operator.gangs import Gang


def disruptable_pods(spec: TPModelSpec, gangs: Iterable[Gang]) -> int | None:
    """maxUnavailable of the PodDisruptionBudget; None: a single gang cannot be protected without blocking drains.

    Pods of Failed gangs that are not Ready come on top: nobody waits for them to come back, so they must not use up
    the budget of the gangs that serve.
    """
    if spec.replicas < 2:
        return None
    broken = sum(
        max(0, gang.size - sum(pod.ready for pod in gang.pods)) for gang in gangs if gang.status.failure is not None
    )
    return spec.disruption_budget + broken
