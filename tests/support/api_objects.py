"""Objects as the API server gives them, for tests of what reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from tpmodel_operator import names

Json = dict[str, Any]

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> str:
    """A time so many seconds after START, as the API writes it."""
    return (START + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def metadata(name: str, *, uid: str = "", version: int = 1, namespace: str = "default", **more: Any) -> Json:
    return {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-of-{name}",
        "resourceVersion": str(version),
        "creationTimestamp": at(0),
    } | more


def pod(name: str = "m-0-abcde-0", *, model: str = "m", version: int = 1, uid: str = "", **status: Any) -> Json:
    """A pod of a gang; the name says which gang, and its place in it."""
    gang, _, index = name.rpartition("-")
    labels = names.gang_labels(model, gang, 0, gang.rpartition("-")[2]) | {names.POD_INDEX: index}
    return {
        "metadata": metadata(name, uid=uid, version=version, labels=labels),
        "spec": {"nodeName": "node-1"},
        "status": {"phase": "Pending"} | status,
    }


def worker(*, restarts: int = 0, last: Json | None = None, **state: Any) -> list[Json]:
    """containerStatuses with a sidecar before the worker's."""
    return [
        {"name": "sidecar", "restartCount": 7, "state": {"running": {"startedAt": at(9999)}}},
        {"name": names.CONTAINER, "restartCount": restarts, "state": state, "lastState": last or {}},
    ]


def condition(kind: str, status: str, seconds: float) -> Json:
    return {"type": kind, "status": status, "lastTransitionTime": at(seconds)}


def stateful_set(name: str = "m-0-abcde", *, model: str = "m", version: int = 1, image: str = "worker:1") -> Json:
    revision = name.rpartition("-")[2]
    return {
        "metadata": metadata(
            name,
            version=version,
            labels=names.gang_labels(model, name, 0, revision),
            annotations={names.IMAGE_ANNOTATION: image},
        ),
        "spec": {
            "replicas": 2,
            "template": {"spec": {"containers": [{"name": names.CONTAINER, "image": f"mirror.local/{image}"}]}},
        },
    }


def tpmodel(name: str = "m", *, uid: str = "", version: int = 1, status: Json | None = None, **spec: Any) -> Json:
    return {
        "apiVersion": "tpmodel.dev/v1alpha1",
        "kind": "TPModel",
        "metadata": metadata(name, uid=uid, version=version, generation=1),
        "spec": {"model": {"uri": "hf://organisation/name"}} | spec,
        "status": status or {},
    }
