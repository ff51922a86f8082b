"""What NetworkPolicies allow, computed: a small evaluator of ingress rules, as their API defines them.

Not every cluster's network enforces them; the test cluster's does not. Only what the project's policies use is
understood; the rest is refused.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
Labels = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a connection comes from: a pod of a namespace, or an address outside of the cluster."""

    pod: Labels | None = None
    namespace: str = ""
    namespace_labels: Labels = field(default_factory=dict)
    address: str = ""


def allows(policies: Iterable[Object], target: Object, source: Source, port: int) -> bool:
    """Whether a TCP connection from the source to a port of the target pod is let through.

    Policies add up. A pod that none selects is open to everybody.
    """
    labels, namespace = target["metadata"]["labels"], target["metadata"]["namespace"]
    selecting = [
        policy
        for policy in policies
        if policy["metadata"]["namespace"] == namespace
        and "Ingress" in policy["spec"]["policyTypes"]
        and matches(policy["spec"]["podSelector"], labels)
    ]
    rules = [rule for policy in selecting for rule in policy["spec"].get("ingress", [])]
    return not selecting or any(_port_fits(rule, port) and _source_fits(rule, source, namespace) for rule in rules)


def matches(selector: Object, labels: Labels) -> bool:
    """Whether a label selector selects; an empty one selects all."""
    exact = selector.get("matchLabels", {})
    return all(labels.get(name) == value for name, value in exact.items()) and all(
        _meets(requirement, labels) for requirement in selector.get("matchExpressions", [])
    )


def _meets(requirement: Object, labels: Labels) -> bool:
    value = labels.get(requirement["key"])
    match requirement["operator"]:
        case "In":
            return value in requirement["values"]
        case "NotIn":
            return value not in requirement["values"]
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case other:
            raise ValueError(f"no such operator: {other}")


def _port_fits(rule: Object, port: int) -> bool:
    """No ports named: all."""
    ports = rule.get("ports", [])
    return not ports or any(_one_port_fits(entry, port) for entry in ports)


def _one_port_fits(entry: Object, port: int) -> bool:
    if entry.get("protocol", "TCP") != "TCP":
        return False
    if not isinstance(entry.get("port"), int | None):
        raise ValueError(f"named ports are not understood here: {entry}")
    first = entry.get("port")
    return first is None or first <= port <= entry.get("endPort", first)


def _source_fits(rule: Object, source: Source, namespace: str) -> bool:
    """No peers named: everybody."""
    peers = rule.get("from", [])
    return not peers or any(_peer_fits(peer, source, namespace) for peer in peers)


def _peer_fits(peer: Object, source: Source, namespace: str) -> bool:
    if "ipBlock" in peer:
        return bool(source.address) and _in_block(peer["ipBlock"], source.address)
    if source.pod is None:
        return False
    if "namespaceSelector" in peer:
        if not matches(peer["namespaceSelector"], source.namespace_labels):
            return False
    elif source.namespace != namespace:
        return False
    return matches(peer.get("podSelector", {}), source.pod)


def _in_block(block: Object, address: str) -> bool:
    outside = any(_inside(address, part) for part in block.get("except", []))
    return _inside(address, block["cidr"]) and not outside


def _inside(address: str, network: str) -> bool:
    return ipaddress.ip_address(address) in ipaddress.ip_network(network)
