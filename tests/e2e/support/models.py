"""One TPModel in the cluster: its status, gangs and pods, and waiting for them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.waiting import wait_until
from tests.e2e.support.manifests import tpmodel
from tpmodel_operator import names

READY_SECONDS = 240.0
"""For gangs to be made and ready: each pod imports torch, several at a time on two cores; 20 to 60 s are usual."""
GONE_SECONDS = 90.0
"""For the pods of a deleted model to go: none has requests to finish, and garbage collection comes first."""


@dataclass(frozen=True)
class DeployedModel:
    """The TPModel `name` in kubectl's namespace."""

    kubectl: Kubectl
    name: str

    # ---------------------------------------------------------------------------------------------- what is there

    def get(self) -> Object:
        """The object."""
        return self.kubectl.get("tpmodel", self.name)

    def status(self) -> Object:
        """Its status, {} before the operator has written one."""
        return self.get().get("status", {})

    def gangs(self) -> list[Object]:
        """Status of each gang."""
        return self.status().get("gangs", [])

    def gang(self, name: str = "") -> Object:
        """Status of the gang of this name, or of the only one."""
        gangs = self.gangs()
        found = [gang for gang in gangs if gang["name"] == name] if name else gangs
        assert len(found) == 1, f"{name or 'one gang'} among {[gang['name'] for gang in gangs]}"
        return found[0]

    def condition(self, kind: str) -> Object:
        """A condition of its status; {} where there is none."""
        return condition(self.status(), kind)

    def pods(self, gang: str = "") -> list[Object]:
        """Its pods, or those of a gang, by gang and index; terminating ones too."""
        selector = f"{names.GANG_LABEL}={gang}" if gang else f"{names.MODEL_LABEL}={self.name}"
        return sorted(self.kubectl.list("pods", selector=selector), key=lambda pod: pod["metadata"]["name"])

    def uids(self, gang: str = "") -> set[str]:
        """UIDs of its pods, or of a gang's."""
        return {pod["metadata"]["uid"] for pod in self.pods(gang)}

    def leaders(self) -> list[Object]:
        """The leader pods that are Ready and not terminating."""
        leaders = self.kubectl.list("pods", selector=f"{names.MODEL_LABEL}={self.name},{names.POD_INDEX}=0")
        return [pod for pod in leaders if is_ready(pod) and not is_terminating(pod)]

    def events(self, reason: str = "") -> list[Object]:
        """Events about it, or those with a reason; not about an earlier one of its name."""
        selector = f"involvedObject.uid={self.get()['metadata']['uid']}"
        listed = self.kubectl.run("get", "events", f"--field-selector={selector}", "--output=json")
        return [event for event in json.loads(listed)["items"] if reason in ("", event["reason"])]

    def wait_events(self, reason: str, count: int = 1, *, saying: str = "") -> list[Object]:
        """Events with a reason and a message that has `saying`, once there are so many: they follow the status."""

        def told() -> list[Object]:
            return [event for event in self.events(reason) if saying in event["message"]]

        return self.until(lambda: told() if len(told()) >= count else None, what=f"{count} Events {reason}", seconds=30)

    @property
    def url(self) -> str:
        """What clients in the cluster dial, as status says."""
        return self.status()["url"]

    # ---------------------------------------------------------------------------------------------------- changes

    def patch(self, spec: Object) -> None:
        """Merge-patches its spec."""
        self.kubectl.patch("tpmodel", self.name, {"spec": spec})

    def scale(self, replicas: int) -> None:
        """`kubectl scale`: through the scale subresource, as people and autoscalers do."""
        self.kubectl.run("scale", f"tpmodel/{self.name}", f"--replicas={replicas}")

    def delete(self, *, wait: bool = True) -> None:
        """Deletes it; with `wait` returns when none of its pods is left."""
        self.kubectl.delete("tpmodel", self.name)
        if wait:
            self.until(lambda: not self.pods(), what="end of all pods", seconds=GONE_SECONDS)

    # ---------------------------------------------------------------------------------------------------- waiting

    def wait_ready(self, *, seconds: float = READY_SECONDS) -> None:
        """Returns when the operator has seen the spec, every gang of it is made, and no other is left."""
        self.until(self._settled, what="ready, with nothing in progress", seconds=seconds)

    def until(
        self, condition: Callable[[], Any], *, what: str, seconds: float = READY_SECONDS, interval: float = 1.0
    ) -> Any:
        """Returns the condition's first true value; past the time limit raises with all that is known of the model."""
        what = f"{self.name}: {what}"
        return wait_until(condition, what=what, seconds=seconds, explain=self.explain, interval=interval)

    def explain(self) -> str:
        """For people: conditions, gangs and pods."""
        with contextlib.suppress(ClusterError):
            return "\n".join(self._lines())
        return f"there is no TPModel {self.name}"

    def _settled(self) -> bool:
        model = self.get()
        status = model.get("status", {})
        observed = status.get("observedGeneration") == model["metadata"]["generation"]
        ready = condition(status, "Ready").get("status") == "True"
        return observed and ready and condition(status, "Progressing").get("status") == "False"

    def _lines(self) -> Iterator[str]:
        status = self.status()
        for item in status.get("conditions", []):
            yield f"  {item['type']}={item['status']} {item['reason']}: {item.get('message', '')}"
        for gang in status.get("gangs", []):
            yield f"  gang {gang['name']}: {gang['phase']}, attempt {gang['attempt']}, {gang.get('lastRestart', '')}"
        for pod in self.pods():
            states = [container["state"] for container in pod["status"].get("containerStatuses", [])]
            yield f"  pod {pod['metadata']['name']}: {pod['status'].get('phase')} ready={is_ready(pod)} {states}"


def deploy(kubectl: Kubectl, name: str, *, ready: bool = True, **spec: Any) -> DeployedModel:
    """Applies a TPModel (see manifests.tpmodel), and waits until it is ready unless told not to."""
    kubectl.apply(tpmodel(name, **spec))
    model = DeployedModel(kubectl, name)
    if ready:
        model.wait_ready()
    return model


@contextlib.contextmanager
def deployed(kubectl: Kubectl, name: str, *, ready: bool = True, **spec: Any) -> Iterator[DeployedModel]:
    """The same, for as long as the block lasts. Its pods end while the next test begins; see `wait_all_gone`."""
    model = DeployedModel(kubectl, name)
    try:
        deploy(kubectl, name, ready=ready, **spec)
        yield model
    finally:
        model.delete(wait=False)


def wait_all_gone(kubectl: Kubectl) -> None:
    """Returns when no pod of any model is left, all models being deleted."""

    def left() -> str:
        return kubectl.run("get", "pods", f"--selector={names.MODEL_LABEL}", "--output=name")

    wait_until(lambda: not left(), what="end of all pods of deleted models", seconds=GONE_SECONDS, explain=left)


def condition(status: Object, kind: str) -> Object:
    """A condition of a status; {} where there is none."""
    return next((item for item in status.get("conditions", []) if item["type"] == kind), {})


def is_ready(pod: Object) -> bool:
    """Whether the pod's Ready condition holds."""
    return condition(pod.get("status", {}), "Ready").get("status") == "True"


def is_terminating(pod: Object) -> bool:
    """Whether it is being deleted."""
    return "deletionTimestamp" in pod["metadata"]


def revision_of(pod: Object) -> str:
    """Hash of the spec and image that the pod was made from."""
    return pod["metadata"]["labels"][names.REVISION_LABEL]


def gang_of(pod: Object) -> str:
    """Name of the pod's gang."""
    return pod["metadata"]["labels"][names.GANG_LABEL]


def node_of(pod: Object) -> str:
    """Name of the node that the pod is bound to."""
    return pod["spec"].get("nodeName", "")
