"""One pod of a gang in a few words, out of the API's JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tpmodel.kubectl import names

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodView:
    """One pod."""

    name: str
    uid: str
    gang: str
    index: int
    """0 is the leader pod."""
    node: str
    ready: bool
    deleting: bool
    started: bool
    """Whether the worker's container has run, so that there is a log."""
    restarts: int
    """Of the worker's container."""
    state: str
    """What its container does, or why it does not run."""
    tls: bool = False
    """Whether its client ports speak TLS."""
    warning: str = ""
    """The newest Event about it, where that may tell more."""


def pod_view(pod: Json) -> PodView:
    """From the API's JSON."""
    metadata, status = pod["metadata"], pod.get("status", {})
    labels = metadata.get("labels", {})
    worker = next((c for c in status.get("containerStatuses", []) if c["name"] == names.CONTAINER), {})
    index = labels.get(names.POD_INDEX_LABEL) or metadata["name"].rpartition("-")[2]
    return PodView(
        name=metadata["name"],
        uid=metadata.get("uid", ""),
        gang=labels.get(names.GANG_LABEL, ""),
        index=int(index) if index.isdecimal() else -1,
        node=pod.get("spec", {}).get("nodeName", ""),
        ready=_condition(status, "Ready").get("status") == "True",
        deleting="deletionTimestamp" in metadata,
        started=bool(worker.get("restartCount")) or bool({"running", "terminated"} & worker.get("state", {}).keys()),
        restarts=worker.get("restartCount", 0),
        state=_state(metadata, status, worker),
        tls=any(volume.get("name") == names.TLS_VOLUME for volume in pod.get("spec", {}).get("volumes", [])),
    )


def _state(metadata: Json, status: Json, worker: Json) -> str:
    now = _now(status, worker)
    parts = ["terminating" + (f", {now}" if now != "running" else "") if "deletionTimestamp" in metadata else now]
    before = worker.get("lastState", {}).get("terminated")
    if before:
        parts.append(f"before that it {_end(before)}")
    return "; ".join(parts)


def _now(status: Json, worker: Json) -> str:
    state = worker.get("state", {})
    if "running" in state:
        return "running"
    if status.get("phase") == "Failed" and status.get("reason"):
        return _with_message(f"failed: {status['reason']}", status)
    if "terminated" in state:
        return _end(state["terminated"])
    if "waiting" in state:
        return _with_message(f"waits: {state['waiting'].get('reason', 'for its container')}", state["waiting"])
    scheduled = _condition(status, "PodScheduled")
    if scheduled.get("status") == "False":
        return _with_message("not scheduled", scheduled)
    return str(status.get("phase", "Pending")).lower()


def _end(terminated: Json) -> str:
    """With the cause as the supervisor wrote it, else as the kubelet calls it."""
    code, reason = terminated.get("exitCode", 0), terminated.get("reason", "")
    words = " ".join(terminated.get("message", "").split()) or (reason if reason not in ("Error", "Completed") else "")
    return f"ended with {code}" + (f": {words}" if words else "")


def _with_message(what: str, entry: Json) -> str:
    message = " ".join(entry.get("message", "").split())
    return f"{what}: {message}" if message else what


def _condition(status: Json, kind: str) -> Json:
    conditions: Iterable[Json] = status.get("conditions", [])
    return next((condition for condition in conditions if condition["type"] == kind), {})
