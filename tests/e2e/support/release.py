"""The chart, installed as users install it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster import binaries, checkpoints
from tests.cluster.errors import ClusterError
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.target import Target

CHART = Path(__file__).parents[3] / "charts" / "tpmodel"
NAME = "tpmodel"
NAMESPACE = "tpmodel-system"
CRD = "tpmodels.tpmodel.dev"
LEASE = "tpmodel-operator"
OF_RELEASE = f"app.kubernetes.io/instance={NAME}"
"""Label of all objects of the release."""
OPERATOR_PODS = "app.kubernetes.io/name=tpmodel-operator"
WAIT_SECONDS = 180
"""For helm --wait: two replicas of an image that the nodes have."""


@dataclass(frozen=True)
class Release:
    """The chart's one release in a cluster."""

    target: Target

    @property
    def kubectl(self) -> Kubectl:
        """In the operator's namespace."""
        return self.target.kubectl.within(NAMESPACE)

    def values(self) -> dict[str, Any]:
        """The images under test; no node pulls them. Models may be folders of the nodes below MODELS."""
        return {
            "operator": {"image": image_value(self.target.operator_image), "resyncSeconds": 60},
            "worker": {"image": image_value(self.target.worker_image)},
            "allowedHostPaths": [checkpoints.MODELS],
        }

    def install(self, **changed: Any) -> None:
        """`helm upgrade --install --wait`; changed: top-level values instead of the usual ones."""
        given = yaml.safe_dump({**self.values(), **changed})
        command = ["upgrade", NAME, str(CHART), "--install", "--create-namespace", "--values=-", "--wait"]
        self.helm(*command, f"--timeout={WAIT_SECONDS}s", given=given)

    def test(self) -> str:
        """`helm test`, with the logs of its pods."""
        return self.helm("test", NAME, "--logs", f"--timeout={WAIT_SECONDS}s")

    def uninstall(self) -> None:
        """`helm uninstall --wait`."""
        self.helm("uninstall", NAME, "--wait", f"--timeout={WAIT_SECONDS}s")

    def installed(self) -> bool:
        """Whether the release is there."""
        releases = json.loads(self.helm("list", "--output=json", f"--filter=^{NAME}$"))
        return bool(releases)

    def helm(self, *arguments: str, given: str = "") -> str:
        """Runs helm on the release's namespace; returns its output."""
        command = [str(binaries.path(binaries.HELM)), f"--kubeconfig={self.target.kubectl.kubeconfig}"]
        command += [f"--namespace={NAMESPACE}", *arguments]
        result = subprocess.run(command, input=given, capture_output=True, text=True, timeout=WAIT_SECONDS + 60)
        if result.returncode != 0:
            raise ClusterError(f"helm {' '.join(arguments)}\n{result.stdout}{result.stderr}")
        return result.stdout

    def operators(self) -> list[Object]:
        """The operator's pods."""
        return self.kubectl.list("pods", selector=OPERATOR_PODS)

    def leader(self) -> Object | None:
        """The operator's pod that works; None: nobody holds the Lease, or its holder is gone."""
        lease = self.kubectl.find("lease", LEASE) or {}
        holder = lease.get("spec", {}).get("holderIdentity", "")
        return next((pod for pod in self.operators() if pod["metadata"]["name"] == holder), None)


def image_value(image: str) -> dict[str, str]:
    """An image's name as the chart's values have it."""
    if "@" in image:
        repository, _, digest = image.partition("@")
        return {"repository": repository, "digest": digest}
    repository, _, tag = image.rpartition(":")
    return {"repository": repository, "tag": tag}
