"""From the API's JSON to the records that decisions are made from. Nothing of the JSON is kept.

Thousands of pods are held at once: strings that many of them share are interned.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from tpmodel_operator import names
from tpmodel_operator.api import TPModel, TPModelSpec, TPModelStatus
from tpmodel_operator.observed import ContainerEnd, NodeRecord, PodRecord, StatefulSetRecord

Json = dict[str, Any]


class UnreadableModelError(ValueError):
    """The spec of a TPModel does not fit this operator's API, as when the CRD is newer than the operator."""

    def __init__(self, model: TPModel, problem: str) -> None:
        super().__init__(problem)
        self.model = model
        """The object with an empty spec: who it is, and its status."""


def version(item: Json) -> int:
    """The resource version, as a number: a higher one is newer."""
    return int(item["metadata"].get("resourceVersion") or 0)


def when(text: str | None) -> datetime | None:
    """A time of the API."""
    return datetime.fromisoformat(text) if text else None


def tpmodel(item: Json) -> TPModel:
    """A TPModel; UnreadableModelError where its spec cannot be read."""
    metadata = item["metadata"]
    common = {
        "name": metadata["name"],
        "namespace": metadata["namespace"],
        "uid": metadata["uid"],
        "generation": metadata.get("generation", 0),
        "resource_version": metadata.get("resourceVersion", ""),
        "deleting": "deletionTimestamp" in metadata,
        "annotations": {
            name: value
            for name, value in metadata.get("annotations", {}).items()
            if name in (names.TAKE_IMAGE_ANNOTATION, names.REBUILD_ANNOTATION, names.RESET_WEIGHTS_ANNOTATION)
        },
        "status": TPModelStatus.model_validate(item.get("status") or {}),
    }
    try:
        return TPModel(spec=TPModelSpec.model_validate(item.get("spec") or {}), **common)
    except ValidationError as error:
        problems = "; ".join(f"spec.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5])
        raise UnreadableModelError(TPModel(spec=TPModelSpec.model_construct(), **common), problems) from error


def pod(item: Json) -> PodRecord | None:
    """A pod; None where its labels say of no gang."""
    metadata = item["metadata"]
    labels = metadata.get("labels", {})
    index = labels.get(names.POD_INDEX) or metadata["name"].rpartition("-")[2]
    if names.MODEL_LABEL not in labels or names.GANG_LABEL not in labels or not index.isdecimal():
        return None
    status = item.get("status", {})
    conditions = status.get("conditions", [])
    container = _worker(status.get("containerStatuses", []))
    ready = next((c for c in conditions if c["type"] == "Ready"), {})
    deleted = when(metadata.get("deletionTimestamp"))
    grace = int(metadata.get("deletionGracePeriodSeconds") or 0)
    created = datetime.fromisoformat(metadata["creationTimestamp"])
    state = container.get("state", {})
    return PodRecord(
        name=metadata["name"],
        uid=metadata["uid"],
        namespace=sys.intern(metadata["namespace"]),
        model=sys.intern(labels[names.MODEL_LABEL]),
        gang=sys.intern(labels[names.GANG_LABEL]),
        index=int(index),
        created=created,
        changed=max([created, *_changes(conditions, container)]),
        # The API's deletionTimestamp is when the grace period ends.
        deleting_since=deleted - timedelta(seconds=grace) if deleted else None,
        grace_seconds=grace,
        node=sys.intern(item.get("spec", {}).get("nodeName", "")),
        ip=status.get("podIP", ""),
        phase=sys.intern(status.get("phase", "Pending")),
        running="running" in state,
        ready=ready.get("status") == "True",
        ready_changed=when(ready.get("lastTransitionTime")),
        waiting_reason=sys.intern(state.get("waiting", {}).get("reason", "")),
        restart_count=int(container.get("restartCount", 0)),
        ended=_end(state.get("terminated") or container.get("lastState", {}).get("terminated")),
    )


def pod_alarms(before: PodRecord | None, after: PodRecord | None) -> bool:
    """Whether a change of a pod may be a fault of its gang; all that a pod goes through when it comes up is none."""
    if before is None or after is None:
        return after is None
    return (
        after.ended != before.ended
        or (before.ready and not after.ready)
        or (after.deleting_since is not None and before.deleting_since is None)
        or after.phase != before.phase == "Running"
    )


def stateful_set(item: Json) -> StatefulSetRecord | None:
    """A StatefulSet; None where its labels say of no gang."""
    metadata = item["metadata"]
    labels = metadata.get("labels", {})
    index = labels.get(names.GANG_INDEX_LABEL, "")
    if names.MODEL_LABEL not in labels or names.REVISION_LABEL not in labels or not index.isdecimal():
        return None
    return StatefulSetRecord(
        name=metadata["name"],
        uid=metadata["uid"],
        namespace=sys.intern(metadata["namespace"]),
        model=sys.intern(labels[names.MODEL_LABEL]),
        index=int(index),
        revision=sys.intern(labels[names.REVISION_LABEL]),
        pods=int(item["spec"].get("replicas", 1)),
        image=sys.intern(_image(item)),
        created=datetime.fromisoformat(metadata["creationTimestamp"]),
        deleting="deletionTimestamp" in metadata,
        weights_source=sys.intern(metadata.get("annotations", {}).get(names.WEIGHTS_SOURCE_ANNOTATION, "")),
    )


def node(item: Json) -> NodeRecord:
    """A node."""
    ready = next((c for c in item.get("status", {}).get("conditions", []) if c["type"] == "Ready"), {})
    return NodeRecord(
        name=item["metadata"]["name"],
        ready=ready.get("status") == "True",
        ready_changed=when(ready.get("lastTransitionTime")),
    )


def _worker(containers: Iterable[Json]) -> Json:
    return next((container for container in containers if container["name"] == names.CONTAINER), {})


def _image(item: Json) -> str:
    """What the gang was made with: the annotation, since a registry mirror may have changed the container's."""
    annotated = item["metadata"].get("annotations", {}).get(names.IMAGE_ANNOTATION)
    containers = item["spec"]["template"]["spec"].get("containers", [])
    return annotated or _worker(containers).get("image", "")


def _changes(conditions: Iterable[Json], container: Json) -> list[datetime]:
    """Times at which the pod got further, or back. Times only, so that a fresh operator finds the same; a container
    that waits changes its reason to and fro, which is no change."""
    state = container.get("state", {})
    texts = [condition.get("lastTransitionTime") for condition in conditions]
    texts += [state.get("running", {}).get("startedAt"), state.get("terminated", {}).get("finishedAt")]
    return [moment for text in texts if (moment := when(text))]


def _end(terminated: Json | None) -> ContainerEnd | None:
    if not terminated:
        return None
    return ContainerEnd(
        exit_code=int(terminated.get("exitCode", 0)),
        message=terminated.get("message", "").strip(),
        time=when(terminated.get("finishedAt")),
    )
