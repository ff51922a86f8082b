"""A TPModel and a gang for builders' tests, and a reader of NetworkPolicies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    """Whether NetworkPolicies of the target's namespace let the source in, as Kubernetes defines them."""
    selecting = [policy["spec"] for policy in policies if _selects(policy["spec"]["podSelector"], target.labels)]
    if not selecting:
        return True
    rules = [rule for policy in selecting for rule in policy["ingress"]]
    return any(
        (not rule.get("ports") or any(given["port"] == port for given in rule["ports"]))
        and ("from" not in rule or any(_is_peer(peer, source, target.namespace) for peer in rule["from"]))
        for rule in rules
    )


def _is_peer(peer: dict[str, Any], source: Source, namespace: str) -> bool:
    if "ipBlock" in peer:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": source.namespace}):
            return False
    elif source.namespace != namespace:
        return False
    return _selects(peer.get("podSelector", {}), source.labels)


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    assert all(expression["operator"] == "In" for expression in expressions)
    return all(labels.get(key) == value for key, value in wanted.items()) and all(
        labels.get(expression["key"]) in expression["values"] for expression in expressions
    )
