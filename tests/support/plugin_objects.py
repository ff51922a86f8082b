"""TPModels and pods as `kubectl get` gives them, with statuses that the operator's own decisions made."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from support import api_objects
from support.operator_cluster import Cluster
from tpmodel.kubectl.view import ModelView, model_view
from tpmodel_operator.api import GROUP, KIND, VERSION
from tpmodel_operator.observed import PodRecord

Json = dict[str, Any]


def model_json(cluster: Cluster) -> Json:
    """The cluster's TPModel, with the defaults that the API server fills in."""
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {
            "name": cluster.name,
            "namespace": "space",
            "generation": cluster.generation,
            "creationTimestamp": api_objects.at(0),
        },
        "spec": cluster.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        "status": cluster.status.model_dump(mode="json", by_alias=True, exclude_none=True),
    }


def pods_json(cluster: Cluster) -> list[Json]:
    """The cluster's pods."""
    return [pod_json(pod) for pod in cluster.pods.values()]


def pod_json(pod: PodRecord) -> Json:
    """One pod."""
    ended = pod.ended
    terminated = {"exitCode": ended.exit_code, "message": ended.message, "reason": "Error"} if ended else None
    if pod.running:
        containers = api_objects.worker(
            restarts=pod.restart_count,
            last={"terminated": terminated} if terminated else None,
            running={"startedAt": api_objects.at(1)},
        )
    elif terminated:
        containers = api_objects.worker(restarts=pod.restart_count, terminated=terminated)
    else:
        containers = api_objects.worker(waiting={"reason": pod.waiting_reason or "ContainerCreating"})
    item = api_objects.pod(
        pod.name,
        model=pod.model,
        uid=pod.uid,
        phase=pod.phase,
        conditions=[api_objects.condition("Ready", str(pod.ready), 1)],
        containerStatuses=containers,
    )
    item["spec"]["nodeName"] = pod.node
    if pod.deleting_since is not None:
        item["metadata"]["deletionTimestamp"] = written(pod.deleting_since)
    return item


def view(cluster: Cluster) -> ModelView:
    """As the plugin reads both."""
    return model_view(model_json(cluster), pods_json(cluster))


def written(moment: datetime) -> str:
    """As the API writes times."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
