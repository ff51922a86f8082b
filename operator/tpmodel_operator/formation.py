"""The first minutes of an attempt: until every container has started, nothing that happens is a fault.

In mode InPlace a pod that was lost is made again within the attempt, and its gang waits for it as it did at first.

Nodes are found, images pulled, claims bound; a gang restarted meanwhile would begin all that anew. Only waiting
without any change for longer than the formation deadline ends it. Afterwards the supervisors judge.
"""

from __future__ import annotations

from datetime import datetime

from tpmodel_operator import clock
from tpmodel_operator.api import Recovery
from tpmodel_operator.gangs import Gang
from tpmodel_operator.observed import PodRecord


def has_started(pod: PodRecord) -> bool:
    """Whether the worker's container has run at least once."""
    return pod.running or pod.ended is not None or pod.restart_count > 0


def is_complete(gang: Gang) -> bool:
    """Whether every pod exists and its container has started."""
    started = {pod.index for pod in gang.pods if has_started(pod)}
    return gang.size > 0 and started >= set(range(gang.size))


def deadline(gang: Gang, recovery: Recovery) -> datetime | None:
    """When waiting has lasted too long, if nothing changes until then; None: there is no StatefulSet yet.

    It counts from the last change of any pod's status. Pods whose container has ended do not count: one that crashes
    again and again changes for ever.
    """
    if gang.statefulset is None:
        return None
    changes = [gang.statefulset.created]
    changes += [pod.changed for pod in gang.pods if pod.ended is None and pod.restart_count == 0]
    restart = gang.status.last_restart
    if restart is not None and (decided := clock.moment(restart.time)) is not None:
        changes.append(decided)
    if (since := clock.moment(gang.status.incomplete_since)) is not None:
        changes.append(since)
    return clock.later(max(changes), recovery.formation_deadline)


def what_is_missing(gang: Gang) -> str:
    """For people: which pods have not started, and why."""
    waiting = [
        f"{pod.name} ({pod.waiting_reason or ('not scheduled' if not pod.node else 'not started')})"
        for pod in gang.pods
        if not has_started(pod)
    ]
    absent = gang.size - len({pod.index for pod in gang.pods})
    if absent > 0:
        waiting.append(f"{absent} pods that do not exist")
    return ", ".join(waiting) or "no pod"
