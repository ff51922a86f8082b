"""A claim that pods may write and share: a folder on one of the local cluster's nodes."""

from __future__ import annotations

from tests.cluster.checkpoints import LABEL
from tests.cluster.kubectl import Kubectl, Object
from tests.cluster.node import SRV, Node

MODE = "ReadWriteMany"


def create(kubectl: Kubectl, node: Node, name: str) -> str:
    """An empty one; nodes share no disk, so all pods with it are scheduled to this node. Returns the claim's name."""
    assert kubectl.namespace is not None
    folder = f"caches/{kubectl.namespace}-{name}"
    here = node.disk / SRV.strip("/") / folder
    here.mkdir(parents=True)
    # Pods run as a user that the node does not know.
    here.chmod(0o777)
    volume = f"{kubectl.namespace}-{name}"
    kubectl.apply(_volume(volume, kubectl.namespace, name, f"{SRV}/{folder}", node.name), _claim(volume, name))
    kubectl.wait("pvc", name, "jsonpath={.status.phase}=Bound")
    return name


def _volume(volume: str, namespace: str, claim: str, path: str, node: str) -> Object:
    on_node = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": volume, "labels": {LABEL: namespace}},
        "spec": {
            "accessModes": [MODE],
            "capacity": {"storage": "1Gi"},
            "storageClassName": "",
            "persistentVolumeReclaimPolicy": "Retain",
            "claimRef": {"namespace": namespace, "name": claim},
            "hostPath": {"path": path, "type": "Directory"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [on_node]}]}},
        },
    }


def _claim(volume: str, name: str) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": [MODE],
            "resources": {"requests": {"storage": "1Gi"}},
            "storageClassName": "",
            "volumeName": volume,
        },
    }
