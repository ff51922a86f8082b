"""The operator's replicas: their metrics, the end of one, another in its place; of the local cluster."""

from __future__ import annotations

import re
import urllib.request

from tests.cluster.kubectl import Object
from tests.cluster.waiting import wait_until
from tests.e2e.support import pod_processes
from tests.e2e.support.release import LEASE, NAMESPACE, Release

METRICS_PORT = 8081
CONTAINER = "operator"
LEADS_SECONDS = 60.0
"""For a replica to lead (15 s until a dead one's Lease expires) and to have its first passes, on a busy machine."""
FAILED, DONE = 'reconcile_seconds_count{result="error"}', 'reconcile_seconds_count{result="ok"}'
"""Names of metrics: passes that ended so."""


def metrics(release: Release) -> dict[str, float]:
    """Those of the replica that works, by name without prefix; waits until there is one."""
    return wait_until(lambda: _metrics(release.leader()), what="a leading operator", seconds=LEADS_SECONDS)


def kill_leader(release: Release, *, lease: bool = True) -> None:
    """SIGKILL of the replica that works.

    Its container starts again under the same name and may go on leading, or the other replica does: that one has to
    wait until the Lease expires, unless the Lease is removed (`lease` False).
    """
    pod_processes.kill(pod_processes.first_of(_leader(release), CONTAINER))
    if not lease:
        release.kubectl.delete("lease", LEASE)


def replace_leader(release: Release) -> None:
    """Another process leads, and has looked at every model."""
    former = _leader(release)
    release.kubectl.delete("pod", former["metadata"]["name"], wait=False)

    def has_looked() -> bool:
        now = release.leader()
        if now is None or now["metadata"]["uid"] == former["metadata"]["uid"]:
            return False
        found = _metrics(now)
        return 0 < found.get("models", 0) <= found.get(DONE, 0)

    wait_until(has_looked, what="a pass of a fresh operator over every model", seconds=LEADS_SECONDS)


def user(release: Release) -> str:
    """As whom they speak to the API server."""
    return f"system:serviceaccount:{NAMESPACE}:{release.operators()[0]['spec']['serviceAccountName']}"


def _leader(release: Release) -> Object:
    return wait_until(release.leader, what="a leading operator", seconds=LEADS_SECONDS)


def _metrics(pod: Object | None) -> dict[str, float]:
    """Nothing where there is no pod, or where it does not answer."""
    if pod is None:
        return {}
    try:
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:{METRICS_PORT}/metrics", timeout=5) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return {name: float(value) for name, value in re.findall(r"^tpmodel_operator_(\S+) (\S+)$", text, re.MULTILINE)}
