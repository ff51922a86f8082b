"""A TPModel and a gang for builders' tests, and who may connect to whom."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from support import network_policies
from support.operator_cluster import IMAGE, spec_with
from tpmodel_operator import names
from tpmodel_operator.actions import EnsureGang
from tpmodel_operator.api import TPModel

GANG = EnsureGang(name="chat-0-bcdfg", index=0, revision="bcdfg", image=IMAGE, attempt=3)


def model_with(**changes: Any) -> TPModel:
    """The TPModel `chat` in namespace `space`."""
    return TPModel(name="chat", namespace="space", uid="model-uid", generation=1, spec=spec_with(**changes))


def sibling(index: int) -> EnsureGang:
    """Another gang of the same model."""
    return EnsureGang(name=f"chat-{index}-bcdfg", index=index, revision="bcdfg", image=IMAGE, attempt=1)


@dataclass(frozen=True)
class Source:
    """Where a connection comes from."""

    namespace: str
    labels: dict[str, str]


def gang_pod(gang: EnsureGang, namespace: str = "space") -> Source:
    """A pod of a gang of `chat`."""
    return Source(namespace, names.gang_labels("chat", gang.name, gang.index, gang.revision))


def may_connect(policies: Iterable[dict[str, Any]], source: Source, target: Source, port: int) -> bool:
    """Whether NetworkPolicies of the target's namespace let the source in."""
    pod = {"metadata": {"namespace": target.namespace, "labels": target.labels}}
    namespace = {"kubernetes.io/metadata.name": source.namespace}
    connecting = network_policies.Source(pod=source.labels, namespace=source.namespace, namespace_labels=namespace)
    return network_policies.allows(policies, pod, connecting, port)
