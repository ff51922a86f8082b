"""What happened between two statuses of a TPModel, as metrics."""

from __future__ import annotations

from datetime import datetime

from tpmodel_operator import clock
from tpmodel_operator.api import GangStatus, TPModelStatus
from tpmodel_operator.metrics import Metrics
from tpmodel_operator.observed import Observed


class History:
    """Counts restarts by cause, and measures how long gangs take to be Ready."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def learn(self, observed: Observed, after: TPModelStatus) -> None:
        """One pass went from the observed status to this one."""
        before = {gang.name: gang for gang in observed.model.status.gangs}
        created = {record.name: record.created for record in observed.statefulsets}
        for gang in after.gangs:
            earlier = before.get(gang.name)
            if earlier is not None and earlier.uid in ("", gang.uid):
                self._compare(earlier, gang, created.get(gang.name), observed.now)

    def _compare(self, before: GangStatus, after: GangStatus, created: datetime | None, now: datetime) -> None:
        if after.restarts_total > before.restarts_total and after.last_restart is not None:
            self._metrics.gang_restarts.labels(after.last_restart.cause).inc()
        if not after.ready or before.ready or before.not_ready_since:
            return  # not Ready, was so already, or is so again without a restart
        if after.last_restart is None:
            if created is not None:
                self._metrics.time_to_ready.observe((now - created).total_seconds())
        elif (decided := clock.moment(after.last_restart.time)) is not None:
            self._metrics.restart_seconds.observe((now - decided).total_seconds())
