"""What a cluster adds to an API server, as far as the operator sees it: StatefulSets get pods, pods run and end,
what lost its owner goes. One thread, which looks at everything twenty times a second."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from urllib3.exceptions import HTTPError

from support.crd_server import KubeApi, RefusedError
from tpmodel_operator import names

Json = dict[str, Any]

STATEFUL_SETS = "/apis/apps/v1/statefulsets"
PODS = "/api/v1/pods"
PERIOD = 0.05
NODE = "node-a"


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class SimulatedCluster:
    """StatefulSet controller, kubelet and garbage collector of pods."""

    def __init__(self, api: KubeApi) -> None:
        self.api = api
        self.paused = False
        """While set, nothing is done: pods neither come, nor run, nor go."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    # ---------------------------------------------------------------------------------------------- for tests

    def pods(self, model: str | None = None) -> list[Json]:
        """All pods of TPModels, or of one."""
        items = self.api.call("GET", PODS, labelSelector=names.WATCH_SELECTOR)["items"]
        return [pod for pod in items if model in (None, pod["metadata"]["labels"].get(names.MODEL_LABEL))]

    def uids(self, model: str) -> set[str]:
        """UIDs of a model's pods."""
        return {pod["metadata"]["uid"] for pod in self.pods(model)}

    def end_container(self, pod: Json, code: int, message: str = "") -> None:
        """The worker's container of a running pod ends, and the kubelet starts it again."""
        ended = {"exitCode": code, "message": message, "startedAt": now(), "finishedAt": now(), "reason": "Error"}
        container = pod["status"]["containerStatuses"][0]
        container |= {"restartCount": container["restartCount"] + 1, "lastState": {"terminated": ended}, "ready": False}
        self._write_status(pod, {"containerStatuses": [container], "conditions": [_condition("Ready", "False")]})

    # --------------------------------------------------------------------------------------------- the thread

    @contextlib.contextmanager
    def running(self) -> Iterator[SimulatedCluster]:
        """Runs as long as the context lasts."""
        self._create_node()
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            if not self.paused:
                # A server that is away, or an object that somebody else changed: the next round tries again.
                with contextlib.suppress(RefusedError, HTTPError):
                    self._round()
            time.sleep(PERIOD)

    def _round(self) -> None:
        sets = {item["metadata"]["uid"]: item for item in self.api.call("GET", STATEFUL_SETS)["items"]}
        present: set[tuple[str, str]] = set()
        for pod in self.pods():
            metadata = pod["metadata"]
            owner = metadata.get("ownerReferences", [{}])[0].get("uid")
            if "deletionTimestamp" in metadata or owner not in sets:
                self._delete(pod)
            elif pod["status"].get("phase") == "Pending":
                self._start(pod)
            present.add((metadata["namespace"], metadata["name"]))
        for item in sets.values():
            for index in range(item["spec"]["replicas"]):
                if (item["metadata"]["namespace"], f"{item['metadata']['name']}-{index}") not in present:
                    self._create(item, index)

    def _create(self, stateful_set: Json, index: int) -> None:
        metadata, template = stateful_set["metadata"], stateful_set["spec"]["template"]
        owner = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": metadata["name"], "uid": metadata["uid"]}
        body = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"{metadata['name']}-{index}",
                "labels": template["metadata"]["labels"] | {names.POD_INDEX: str(index)},
                "annotations": template["metadata"].get("annotations", {}),
                "ownerReferences": [owner | {"controller": True}],
            },
            "spec": template["spec"] | {"nodeName": NODE},
        }
        self.api.call("POST", f"/api/v1/namespaces/{metadata['namespace']}/pods", body)

    def _start(self, pod: Json) -> None:
        container = {
            "name": names.CONTAINER,
            "image": "i",
            "imageID": "i",
            "ready": True,
            "started": True,
            "restartCount": 0,
            "state": {"running": {"startedAt": now()}},
            "lastState": {},
        }
        conditions = [_condition("PodScheduled", "True"), _condition("Ready", "True")]
        status = {"phase": "Running", "podIP": "127.0.0.2", "containerStatuses": [container], "conditions": conditions}
        self._write_status(pod, status)

    def _delete(self, pod: Json) -> None:
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
        self.api.call("DELETE", _path(pod), options)

    def _write_status(self, pod: Json, status: Json) -> None:
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
        self.api.call("PATCH", f"{_path(pod)}/status", body, content_type="application/merge-patch+json")

    def _create_node(self) -> None:
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}}
        self.api.call("POST", "/api/v1/nodes", node)
        status = {"conditions": [_condition("Ready", "True") | {"reason": "KubeletReady", "message": ""}]}
        path = f"/api/v1/nodes/{NODE}/status"
        self.api.call("PATCH", path, {"status": status}, content_type="application/merge-patch+json")


def _condition(kind: str, status: str) -> Json:
    return {"type": kind, "status": status, "lastTransitionTime": now(), "lastProbeTime": None}


def _path(pod: Json) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"
